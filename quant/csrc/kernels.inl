// All kernels over the vector type V in scope, compiled once for each instruction set.
// nf3 is in files of its own, which need what the others define.
inline int quantize_nf3_rows(const PackedWeight&, const Matrix& source, int64_t row_begin, int64_t row_end);
inline void dequantize_nf3(const PackedWeight&, const Region& region, const Matrix& out);
inline int64_t nf3_prepared_bytes(const PackedWeight&, int32_t x_dtype);
inline void prepare_nf3(const PackedWeight&, const Matrix& x, int64_t token, void* prepared);
inline void linear_nf3_rows(const PackedWeight&, const PreparedInput&, int64_t row_begin, int64_t row_end, const Matrix&);

#include "quantize.inl"
#include "dequantize.inl"
#include "linear.inl"
#include "nf3.inl"
#include "nf3_linear.inl"
#include "activation.inl"
#include "step.inl"
#include "latent_attention.inl"
#include "convolution.inl"
#include "delta_net.inl"
#include "mamba.inl"

inline const StepKernels& step_kernels() {
    static const StepKernels kernels = {raw_rows,   rms_norm,   attend,     add_rows,   attend_latents, convolve,
                                        delta_rule, apply_gate, gated_norm, mamba_rule, apply_silu};
    return kernels;
}

inline const KernelSet& kernel_set(const char* name) {
    static const KernelSet kernels = {name,    quantize_rows, dequantize_region, prepared_bytes,
                                      prepare, linear_rows,   read_bytes,      activate,
                                      &step_kernels()};
    return kernels;
}
