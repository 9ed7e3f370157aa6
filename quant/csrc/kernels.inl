// All kernels over the vector type V in scope, compiled once for each instruction set.
#include "quantize.inl"
#include "dequantize.inl"
#include "linear.inl"
#include "step.inl"
#include "activation.inl"

inline const KernelSet& kernel_set(const char* name) {
    static const KernelSet kernels = {name,    quantize_rows, dequantize_region, prepared_bytes,
                                      prepare, linear_rows,   read_bytes,      activate,
                                      &step_kernels()};
    return kernels;
}
