// The host's side of a launch: which rows are aligned, what a dtype's code means, the error code.
#pragma once

#include "device.cuh"

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every row starts on a 16-byte boundary.
inline bool is_aligned(const Rows& rows, int64_t element_size) {
    const auto bits = reinterpret_cast<uintptr_t>(rows.data) |
                      static_cast<uintptr_t>(rows.sample_stride * element_size) |
                      static_cast<uintptr_t>(rows.token_stride * element_size);
    return bits % sizeof(uint4) == 0;
}

inline bool is_aligned(const Matrix& matrix, int64_t element_size) {
    return is_aligned(Rows{matrix.data, matrix.row_stride, 0}, element_size);
}

template <typename Args>
cudaError_t launch(void (*kernel)(const Args), int64_t blocks, dim3 block, const Args& args) {
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));  // the x dimension alone goes beyond 65,535
    config.blockDim = block;
    config.stream = static_cast<cudaStream_t>(args.stream.handle);
    return cudaLaunchKernelEx(&config, kernel, args);
}

// Calls `launch_for` with a value of the dtype's type, on the stream's device.
template <typename LaunchFor>
int launch_on_device(const Stream& stream, Dtype dtype, LaunchFor launch_for) {
    // This module carries a CUDA runtime of its own, which does not hear of the caller's choice.
    cudaError_t error = cudaSetDevice(static_cast<int>(stream.device));
    if (error == cudaSuccess) {
        switch (dtype) {
            case Dtype::kFloat32: error = launch_for(float{}); break;
            case Dtype::kFloat16: error = launch_for(__half{}); break;
            case Dtype::kBFloat16: error = launch_for(__nv_bfloat16{}); break;
            default: return cudaErrorInvalidValue;
        }
    }
    const cudaError_t last = cudaGetLastError();  // also clears it for the next call
    return error != cudaSuccess ? error : last;
}
