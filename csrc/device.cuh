// What every kernel needs: CUDA (or, for g++, the shim), conversions, and sums over a warp.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "host/cuda_shim.h"
#endif

#include "types.h"

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float to_float(float a) { return a; }
__device__ inline float to_float(__half a) { return __half2float(a); }
__device__ inline float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }

template <typename T>
__device__ T from_float(float a);
template <>
__device__ inline float from_float<float>(float a) { return a; }
template <>
__device__ inline __half from_float<__half>(float a) { return __float2half_rn(a); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float a) { return __float2bfloat16_rn(a); }

// A butterfly: every lane gets the same bits.
__device__ inline float warp_sum(float sum) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
    return sum;
}

__device__ inline float warp_max(float highest) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(kWholeWarp, highest, step));
    }
    return highest;
}
