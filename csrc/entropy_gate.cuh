// The kernel body of the entropy gate. entropy_gate.h states what it computes.
//
// A warp takes a row. Ranks need all rows: the last block to finish, known by the ticket it draws,
// walks them once in order. A launch for the ranks alone would cost more than all of this.
#pragma once

#include "device.cuh"
#include "entropy_gate.h"

constexpr int kGateThreads = 512;
constexpr int kGateWarps = kGateThreads / kWarpSize;

// In nats, the same in every lane; NaN for no classes, or where a logit is NaN or +infinity.
template <typename T>
__device__ inline float softmax_entropy(const T* logits, int64_t classes) {
    const int lane = threadIdx.x % kWarpSize;
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
    return logf(sum) - warp_sum(weighted) / sum;
}

// Turns index from 0 or -1 into ranks or -1, by one block.
__device__ inline void rank_rows(const EntropyGate& args) {
    __shared__ int of_warp[kGateWarps];
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    int64_t count = 0;  // of the edited rows so far, the same in every thread
    for (int64_t first = 0; first < args.samples; first += kGateThreads) {
        const int64_t b = first + threadIdx.x;
        // Other blocks wrote these: __ldcg reads them where they are, not in this SM's L1.
        const bool edited = b < args.samples && __ldcg(args.index + b) >= 0;
        const unsigned votes = __ballot_sync(kWholeWarp, edited);
        if (lane == 0) of_warp[warp] = __popc(votes);
        __syncthreads();
        int64_t rank = count + __popc(votes & ((1u << lane) - 1));
        for (int w = 0; w < kGateWarps; ++w) {
            if (w < warp) rank += of_warp[w];
            count += of_warp[w];
        }
        if (edited) {
            args.index[b] = rank;
            args.rows[rank] = b;
        }
        __syncthreads();
    }
    for (int64_t k = count + threadIdx.x; k < args.samples; k += kGateThreads) args.rows[k] = -1;
    if (threadIdx.x == 0) *args.count = count;
}

template <typename T>
__global__ void __launch_bounds__(kGateThreads) entropy_gate_kernel(const EntropyGate args) {
    const int64_t b = int64_t{blockIdx.x} * kGateWarps + threadIdx.x / kWarpSize;
    const bool exists = b < args.samples;
    const T* logits = static_cast<const T*>(args.logits) + (exists ? b * args.row_stride : 0);
    const float entropy = softmax_entropy(logits, exists ? args.classes : 0);
    if (exists && threadIdx.x % kWarpSize == 0) {
        args.entropy[b] = entropy;
        args.index[b] = entropy < static_cast<float>(args.threshold) ? 0 : -1;
    }
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // who draws the last ticket sees what every block wrote before its own
        is_last = atomicAdd(args.counter, 1) == static_cast<int>(gridDim.x) - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    rank_rows(args);
    if (threadIdx.x == 0) *args.counter = 0;  // for the next launch, and for every replay of a graph
}
