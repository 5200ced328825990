// Launches the dynamic neuron on the caller's stream. The kernel itself is in dynamic_neuron.cuh.
#include "dynamic_neuron.cuh"

namespace {

bool rows_are_aligned(const void* first_row, int64_t stride, int64_t element_size) {
    const auto bits = reinterpret_cast<uintptr_t>(first_row) | static_cast<uintptr_t>(stride * element_size);
    return bits % sizeof(uint4) == 0;
}

template <typename T>
cudaError_t launch(const DynamicNeuronArgs& args) {
    const int64_t size = sizeof(T);
    // One decision for the launch: with any misaligned row, all rows take the scalar loads.
    const bool vector = rows_are_aligned(args.y, args.y_stride, size) &&
                        rows_are_aligned(args.x, args.x_stride, size) &&
                        rows_are_aligned(args.key, args.key_stride, size) &&
                        rows_are_aligned(args.value, args.value_stride, size);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(args.M));  // the x dimension alone goes beyond 65,535
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(args.stream);
    return cudaLaunchKernelEx(
        &config, vector ? &dynamic_neuron_kernel<T, true> : &dynamic_neuron_kernel<T, false>, args);
}

bool arguments_are_valid(const DynamicNeuronArgs& args) {
    return args.M <= INT32_MAX && args.tokens_per_index >= 1 && args.tokens_per_index <= INT32_MAX &&
           args.d_in >= 0 && args.activation >= Activation::kIdentity &&
           args.activation <= Activation::kRelu;
}

}  // namespace

extern "C" int dynamic_neuron_forward(const DynamicNeuronArgs* args) {
    if (args->M <= 0 || args->d_out <= 0) return cudaSuccess;
    if (!arguments_are_valid(*args)) return cudaErrorInvalidValue;
    // This module carries a CUDA runtime of its own, which does not hear of the caller's choice.
    cudaError_t error = cudaSetDevice(static_cast<int>(args->device));
    if (error == cudaSuccess) {
        switch (args->dtype) {
            case Dtype::kFloat32: error = launch<float>(*args); break;
            case Dtype::kFloat16: error = launch<__half>(*args); break;
            case Dtype::kBFloat16: error = launch<__nv_bfloat16>(*args); break;
            default: return cudaErrorInvalidValue;
        }
    }
    const cudaError_t last = cudaGetLastError();  // also clears it for the next call
    return error != cudaSuccess ? error : last;
}
