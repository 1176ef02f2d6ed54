// What g++ -fsanitize=alignment,bounds,... calls where C++ leaves the behaviour undefined: here, the end of the launch.
#include "runtime.h"

namespace cuda_host {

namespace {

struct Source {  // each of the compiler's records begins with one
    const char* file;
    uint32_t line, column;
};

struct Type {
    uint16_t kind, bits;
    char name[1];
};

struct Mismatch {
    Source source;
    const Type* type;
    unsigned char log_alignment, kind;
};

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1(const Mismatch* m, uintptr_t address) {
    if (!address) fail("out of bounds: null pointer to %s at %s:%u", m->type->name, m->source.file, m->source.line);
    fail("misaligned: %s at address 0x%zx, which must be a multiple of %u, at %s:%u", m->type->name, size_t(address),
         1u << m->log_alignment, m->source.file, m->source.line);
}

#define CUDA_HOST_UNDEFINED(name, text)                                \
    extern "C" void __ubsan_handle_##name(const Source* source) {      \
        fail("%s at %s:%u", text, source->file, source->line);         \
    }
CUDA_HOST_UNDEFINED(out_of_bounds, "out of bounds: index of an array")
CUDA_HOST_UNDEFINED(shift_out_of_bounds, "shift by the width of the type or more")
CUDA_HOST_UNDEFINED(divrem_overflow, "integer division by zero")
CUDA_HOST_UNDEFINED(add_overflow, "signed overflow of +")
CUDA_HOST_UNDEFINED(sub_overflow, "signed overflow of -")
CUDA_HOST_UNDEFINED(mul_overflow, "signed overflow of *")
CUDA_HOST_UNDEFINED(negate_overflow, "signed overflow of -")
CUDA_HOST_UNDEFINED(float_cast_overflow, "number out of the integer type's range")

}  // namespace cuda_host
