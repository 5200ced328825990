// The kernel body of the softmax's entropy, a warp a row. softmax_entropy.h states what it computes.
#pragma once

#include "device.cuh"
#include "softmax_entropy.h"

constexpr int kEntropyThreads = 128;
constexpr int kEntropyWarps = kEntropyThreads / kWarpSize;

template <typename T>
__global__ void __launch_bounds__(kEntropyThreads) softmax_entropy_kernel(const SoftmaxEntropy args) {
    const int64_t b = int64_t{blockIdx.x} * kEntropyWarps + threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const bool exists = b < args.samples;
    const int64_t classes = exists ? args.classes : 0;  // the last block may have warps without a row
    const T* logits = static_cast<const T*>(args.logits.data) + (exists ? b * args.logits.row_stride : 0);
    float highest = -INFINITY;
    for (int64_t c = lane; c < classes; c += kWarpSize) highest = fmaxf(highest, to_float(logits[c]));
    highest = warp_max(highest);
    // With z = logit - highest and S = sum exp(z): H = log S - sum z exp(z) / S, a sum of two terms
    // that are at least 0, so that nothing cancels.
    float sum = 0.0f, weighted = 0.0f;
    for (int64_t c = lane; c < classes; c += kWarpSize) {
        const float z = to_float(logits[c]) - highest;
        const float e = expf(z);
        sum += e;
        if (e > 0.0f) weighted = fmaf(z, e, weighted);  // an impossible class adds 0, not -inf * 0
    }
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
    if (exists && lane == 0) args.entropy[b] = logf(sum) - weighted / sum;
}
