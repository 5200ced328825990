// The kernel body of the dynamic neuron. dynamic_neuron.h states what it computes.
//
// One block of 128 threads serves one token:
//
//     1. dot:    the threads walk x[m] and K[i] together and sum their products in fp32;
//     2. reduce: shuffles within a warp, then four partial sums through shared memory;
//     3. update: every thread now knows the gate act(dot + b[i]) and adds gate * V[i] to y[m].
//
// Per token that is one read of x and one read and write of y from device memory; K[i] and V[i] are
// shared by all tokens of a query and come from L2. With 2 flops per 2 bytes the kernel is bound by
// memory, so what matters is that loads are wide (16 bytes) and many are in flight (Batch).
//
// A row's result depends on nothing but that row: which thread takes which element, and in which
// order sums are formed, is fixed by d_in alone. The scalar path below walks the very same elements
// in the same order as the vector path, so not even alignment changes a bit.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "host/cuda_shim.h"
#endif

#include "dynamic_neuron.h"

constexpr int kWarpSize = 32;
constexpr int kThreads = 128;
constexpr int kBatch = 4;  // 16-byte chunks per thread and row: 4096 fp16 values are one batch
// Eight blocks leave 64 registers a thread: room for a whole batch. Left to itself the compiler saves
// registers for occupancy, and waits for each pair of loads before it issues the next.
constexpr int kBlocksPerSM = 8;

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

// 16 bytes of a row: what one thread loads at a time. 4 lanes of fp32, 8 of fp16 or bf16.
template <typename T>
union Chunk {
    static constexpr int kLanes = 16 / sizeof(T);
    uint4 bits;
    T lane[kLanes];
    __device__ Chunk() : bits{0, 0, 0, 0} {}
};

// The last chunk of a row whose length is no multiple of the lanes; lanes past the end are zero and
// so add nothing to a dot product. The bounds of the loop are constants, so that it unrolls and the
// chunk stays in registers.
template <typename T>
__device__ inline Chunk<T> load_lanes(const T* row, int lanes) {
    Chunk<T> chunk;
    for (int l = 0; l < Chunk<T>::kLanes; ++l) {
        if (l < lanes) chunk.lane[l] = row[l];
    }
    return chunk;
}

// x, K and V are only ever read: __ldg takes the read-only path. y is read once and then overwritten,
// so there is nothing to keep in L1: __ldcg passes it by.
enum class Access { kReadOnly, kReadThenWrite };

template <bool kVector, Access kAccess, typename T>
__device__ inline Chunk<T> load_chunk(const T* row) {
    if constexpr (!kVector) {
        return load_lanes(row, Chunk<T>::kLanes);
    } else {
        const uint4* address = reinterpret_cast<const uint4*>(row);
        Chunk<T> chunk;
        chunk.bits = kAccess == Access::kReadOnly ? __ldg(address) : __ldcg(address);
        return chunk;
    }
}

template <bool kVector, typename T>
__device__ inline void store_chunk(T* row, const Chunk<T>& chunk) {
    if constexpr (kVector) {
        __stcg(reinterpret_cast<uint4*>(row), chunk.bits);
    } else {
        for (int l = 0; l < Chunk<T>::kLanes; ++l) row[l] = chunk.lane[l];
    }
}

// The chunks that a thread has in flight at once. Chunk c of a row goes to thread c % kThreads. All
// loads of a batch are issued before any is used: one wait for memory instead of kBatch.
template <typename T>
struct Batch {
    Chunk<T> chunk[kBatch];  // zero past the end of the row
};

template <bool kVector, Access kAccess, typename T>
__device__ inline Batch<T> load_batch(const T* row, int64_t first, int64_t chunks) {
    Batch<T> batch;
    for (int u = 0; u < kBatch; ++u) {
        const int64_t c = first + u * kThreads;
        if (c < chunks) batch.chunk[u] = load_chunk<kVector, kAccess>(row + c * Chunk<T>::kLanes);
    }
    return batch;
}

template <typename T>
__device__ inline float dot(const Chunk<T>& a, const Chunk<T>& b, float sum) {
    for (int l = 0; l < Chunk<T>::kLanes; ++l) sum = fmaf(to_float(a.lane[l]), to_float(b.lane[l]), sum);
    return sum;
}

template <typename T>
__device__ inline T add_scaled(T y, float gate, T value) {
    return from_float<T>(fmaf(gate, to_float(value), to_float(y)));
}

// Sum over the block, the same in every thread: a butterfly within each warp, then the warps in order.
__device__ inline float block_sum(float sum) {
    __shared__ float warp_sums[kThreads / kWarpSize];
    for (int step = kWarpSize / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int w = 0; w < kThreads / kWarpSize; ++w) total += warp_sums[w];
    return total;
}

__device__ inline float activate(Activation activation, float a) {
    switch (activation) {
        case Activation::kGelu:  // a * Phi(a)
            return 0.5f * a * (1.0f + erff(a * 0.70710678118654752f));
        case Activation::kGeluTanh:
            return 0.5f * a * (1.0f + tanhf(0.79788456080286536f * (a + 0.044715f * a * a * a)));
        case Activation::kSilu:
            return a / (1.0f + expf(-a));
        case Activation::kRelu:  // written so that NaN stays NaN
            return a < 0.0f ? 0.0f : a;
        default:
            return a;
    }
}

// kVector: every row of x, K, y and V starts on a 16-byte boundary (rows_are_aligned).
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    dynamic_neuron_kernel(const DynamicNeuronArgs args) {
    constexpr int kLanes = Chunk<T>::kLanes;
    const int64_t m = blockIdx.x;
    // Tokens are counted in 31 bits, and a 32-bit division is several times cheaper.
    const int64_t i = args.index[blockIdx.x / static_cast<unsigned>(args.tokens_per_index)];
    if (i < 0) return;  // the whole block leaves together

    const T* x = static_cast<const T*>(args.x) + m * args.x_stride;             // [d_in]
    const T* key = static_cast<const T*>(args.key) + i * args.key_stride;       // [d_in]
    const T* value = static_cast<const T*>(args.value) + i * args.value_stride; // [d_out]
    T* y = static_cast<T*>(args.y) + m * args.y_stride;                         // [d_out]

    constexpr int kStep = kThreads * kBatch;
    const int64_t in_chunks = args.d_in / kLanes;
    const int in_tail = static_cast<int>(args.d_in % kLanes);
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < in_chunks; c += kStep) {
        const Batch<T> a = load_batch<kVector, Access::kReadOnly>(x, c, in_chunks);
        const Batch<T> b = load_batch<kVector, Access::kReadOnly>(key, c, in_chunks);
        for (int u = 0; u < kBatch; ++u) sum = dot(a.chunk[u], b.chunk[u], sum);
    }
    if (in_tail > 0 && threadIdx.x == in_chunks % kThreads) {
        const int64_t j = in_chunks * kLanes;
        sum = dot(load_lanes(x + j, in_tail), load_lanes(key + j, in_tail), sum);
    }

    const float bias = args.bias ? to_float(static_cast<const T*>(args.bias)[i]) : 0.0f;
    const float gate = activate(args.activation, block_sum(sum) + bias);

    const int64_t out_chunks = args.d_out / kLanes;
    const int out_tail = static_cast<int>(args.d_out % kLanes);
    for (int64_t c = threadIdx.x; c < out_chunks; c += kStep) {
        const Batch<T> v = load_batch<kVector, Access::kReadOnly>(value, c, out_chunks);
        Batch<T> row = load_batch<kVector, Access::kReadThenWrite>(y, c, out_chunks);
        for (int u = 0; u < kBatch; ++u) {
            Chunk<T>& chunk = row.chunk[u];
            for (int l = 0; l < kLanes; ++l) {
                chunk.lane[l] = add_scaled(chunk.lane[l], gate, v.chunk[u].lane[l]);
            }
            const int64_t at = c + u * kThreads;
            if (at < out_chunks) store_chunk<kVector>(y + at * kLanes, chunk);
        }
    }
    if (const int l = threadIdx.x; l < out_tail) {
        const int64_t j = out_chunks * kLanes + l;
        y[j] = add_scaled(y[j], gate, value[j]);
    }
}
