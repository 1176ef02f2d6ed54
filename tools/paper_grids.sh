#!/usr/bin/env bash
# Measures the grids of the papers' tables and figures on this machine: tools/paper_grids.sh RESULTS.jsonl [--device gpu]
# With TEXT=file.txt in the environment also a cache of that text. What the memory does goes to RESULTS_machine.json.
# An interrupted run goes on where it ended. Takes about an hour on two cores; `tools/paper_report.py` makes the report.
set -euo pipefail
results=$1
shift
bandwidth() { minirt bandwidth "$@" --save "$results"; }

minirt bandwidth machine -o json "$@" > "${results%.jsonl}_machine.json"
# SparQ, table 4 and the logs behind it; GQA, which no paper timed; all policies beside each other
sparq=sparq:r=16:k=64,sparq:r=32:k=128,sparq:r=32:k=128:k_index=q4
sparq=$sparq,sparq:r=16:k=64:k_index=none,sparq:r=32:k=128:k_index=none
bandwidth attention --heads 32x128 -d 1024-65536*2 --policy $sparq "$@"
bandwidth attention --heads 32x128 -b 4,16,64 -d 4096 --policy $sparq "$@"
bandwidth attention --heads 32/8x128 -d 4096,16384,65536 --policy $sparq "$@"
budgets=window:budget=512,streaming:budget=512,lm-infinite:budget=512,h2o:budget=512,tova:budget=512,d2o:budget=512
bandwidth attention --heads 32x128 -d 8192 --policy sparq:r=32:k=128,topk:k=128,$budgets "$@"
bandwidth attention --heads 32x128 -d 16384 --kv f16,q8_0,q4_0 --policy sparq:r=32:k=128 "$@"
# What --policy auto chooses from, at the shapes of models that it is used with: SmolLM2-135M, Llama 3.2 3B
auto=sparq:r=d/4:k=S/16,sparq:r=d/2:k=S/8,sparq:r=d/4:k=S/16:k_index=q4,sparq:r=d/2:k=S/8:k_index=q4,h2o:budget=1/4
auto=$auto,tova:budget=1/4
bandwidth attention --heads 9/3x64 -d 2048 --kv f16,q8_0 --policy "$auto" "$@"
bandwidth attention --heads 9/3x64 -d 8192 --kv f16,q8_0,q8_0/q4_0,q4_0 --policy "$auto" "$@"
bandwidth attention --heads 24/8x128 -d 8192 --kv f16,q8_0 --policy "$auto" "$@"
# SparQ, figures 9 and 10, and the settings of its microbenchmark in a whole model
figures=sparq:r=d/12:k=S/12,sparq:r=16:k=S/16,sparq:r=32:k=128
bandwidth end-to-end --shape 7b --layers 4 -d 4096-131072*2,45000 --rounds 25 --policy $figures "$@"
bandwidth end-to-end --shape 8b-gqa --layers 4 -d 4096,32768 --policy $figures "$@"
bandwidth end-to-end -d 1024,4096,7168 --policy sparq:r=16:k=128,topk:k=128,$budgets "$@"
[ -z "${TEXT:-}" ] ||
  bandwidth end-to-end -d 4096 --text "$TEXT" --policy sparq:r=16:k=128,sparq:r=16:k=auto,h2o:budget=512 "$@"
# TOVA, table 1; H2O and D2O at a fifth of the context
tova=tova:budget=256,tova:budget=512,tova:budget=1024,tova:budget=2048
bandwidth throughput -b 4 -d 4096 --policy $tova,window:budget=512,h2o:budget=1/5,d2o:budget=1/5 "$@"
