"""What `minirt eval` asks about without --file.

shakespeare.txt  Coriolanus, public domain: repetition, needle and bits per character
questions.json   20 paragraphs with two questions each, in SQuAD's format
articles.json    8 short articles with a summary each

Both JSON files were written for minirt. Their places, people and events are invented, so that a model must read the
context and cannot answer from memory.
"""
