// How a group of threads walks rows: 16 bytes at a time, many loads in flight, sums in a fixed order.
//
// Which thread takes which element, and in which order sums are formed, depends on a row's width and
// the group's size alone. The scalar path takes the very same elements in the same order as the vector
// path, so not even alignment changes a bit.
#pragma once

#include "device.cuh"

// Chunks of a row that a thread has in flight. A chunk of scalar loads is many loads already.
template <bool kVector>
constexpr int kBatch = kVector ? 4 : 1;

// 16 bytes of a row: what one thread loads at a time. 4 lanes of fp32, 8 of fp16 or bf16.
template <typename T>
union Chunk {
    static constexpr int kLanes = 16 / sizeof(T);
    uint4 bits;
    T lane[kLanes];
    __device__ Chunk() : bits{0, 0, 0, 0} {}
};

// The last chunk of a row whose width is no multiple of the lanes; lanes past the end are zero and so
// add nothing to a sum. The bounds of the loop are constants, so that it unrolls and the chunk stays
// in registers.
template <typename T>
__device__ inline Chunk<T> load_lanes(const T* from, int lanes) {
    Chunk<T> chunk;
    for (int l = 0; l < Chunk<T>::kLanes; ++l) {
        if (l < lanes) chunk.lane[l] = from[l];
    }
    return chunk;
}

template <typename T>
__device__ inline void store_lanes(T* to, const Chunk<T>& chunk, int lanes) {
    for (int l = 0; l < Chunk<T>::kLanes; ++l) {
        if (l < lanes) to[l] = chunk.lane[l];
    }
}

// Rows of a neuron serve many tokens and are kept in L1; rows of tokens pass by once, and are the
// first to go.
enum class Access { kKeep, kPassBy };

template <bool kVector, Access kAccess, typename T>
__device__ inline Chunk<T> load_chunk(const T* from) {
    if constexpr (!kVector) {
        return load_lanes(from, Chunk<T>::kLanes);
    } else {
        const uint4* address = reinterpret_cast<const uint4*>(from);
        Chunk<T> chunk;
        chunk.bits = kAccess == Access::kKeep ? __ldg(address) : __ldcs(address);
        return chunk;
    }
}

template <bool kVector, typename T>
__device__ inline void store_chunk(T* to, const Chunk<T>& chunk) {
    if constexpr (kVector) {
        __stcg(reinterpret_cast<uint4*>(to), chunk.bits);
    } else {
        store_lanes(to, chunk, Chunk<T>::kLanes);
    }
}

template <typename T>
__device__ inline float dot(const Chunk<T>& a, const Chunk<T>& b) {
    float sum = 0.0f;
    for (int l = 0; l < Chunk<T>::kLanes; ++l) sum = fmaf(to_float(a.lane[l]), to_float(b.lane[l]), sum);
    return sum;
}

// The chunks of one row that a thread holds at once. All loads of a batch are issued before any is
// used: one wait for memory instead of one for each chunk.
template <typename T, bool kVector>
struct Batch {
    Chunk<T> chunk[kBatch<kVector>];  // zero past the end of the row
};

// A row of `width` elements as the threads of one threadIdx.y walk it: chunk c goes to thread
// c % threads. What is left beyond the last whole chunk is the tail.
template <typename T, bool kVector>
struct Walk {
    static constexpr int kLanes = Chunk<T>::kLanes;
    static constexpr int kChunks = kBatch<kVector>;
    using Batch = ::Batch<T, kVector>;
    int thread, threads;
    int chunks, tail;

    __device__ explicit Walk(int64_t width)
        : thread(static_cast<int>(threadIdx.x)),
          threads(static_cast<int>(blockDim.x)),
          chunks(static_cast<int>(width / kLanes)),
          tail(static_cast<int>(width % kLanes)) {}

    __device__ int step() const { return kChunks * threads; }

    __device__ Batch load_token(const T* row, int first) const { return load<Access::kPassBy>(row, first); }
    __device__ Batch load_neuron(const T* row, int first) const { return load<Access::kKeep>(row, first); }

    template <Access kAccess>
    __device__ Batch load(const T* row, int first) const {
        Batch batch;
        for (int u = 0; u < kChunks; ++u) {
            const int c = first + u * threads;
            if (c < chunks) batch.chunk[u] = load_chunk<kVector, kAccess>(row + int64_t{c} * kLanes);
        }
        return batch;
    }

    __device__ void store(T* row, int first, const Batch& batch) const {
        for (int u = 0; u < kChunks; ++u) {
            const int c = first + u * threads;
            if (c < chunks) store_chunk<kVector>(row + int64_t{c} * kLanes, batch.chunk[u]);
        }
    }

    // This thread's part of token . neuron, given the batches that it starts with.
    __device__ float dot_rows(const T* token, const T* neuron, Batch a, Batch b) const {
        float sum = 0.0f;
        for (int c = thread;;) {
            for (int u = 0; u < kChunks; ++u) sum += dot(a.chunk[u], b.chunk[u]);
            c += step();
            if (c >= chunks) break;
            a = load_token(token, c);
            b = load_neuron(neuron, c);
        }
        if (tail > 0 && thread == chunks % threads) {
            const int64_t j = int64_t{chunks} * kLanes;
            sum += dot(load_lanes(token + j, tail), load_lanes(neuron + j, tail));
        }
        return sum;
    }
};

constexpr int kMaxBlockThreads = 256;

// kCount sums over the threads of each threadIdx.y, the same bits in each of them: a butterfly within
// each warp, then the warps in order. Every thread of the block must come here, and once only.
template <int kCount>
__device__ inline void row_sums(float (&sums)[kCount]) {
    for (float& sum : sums) sum = warp_sum(sum);
    const unsigned warps = blockDim.x / kWarpSize;
    if (warps == 1) return;
    __shared__ float of_warp[kCount][kMaxBlockThreads / kWarpSize];
    const unsigned first = threadIdx.y * warps;
    if (threadIdx.x % kWarpSize == 0) {
        for (int s = 0; s < kCount; ++s) of_warp[s][first + threadIdx.x / kWarpSize] = sums[s];
    }
    __syncthreads();
    for (int s = 0; s < kCount; ++s) {
        sums[s] = 0.0f;
        for (unsigned w = 0; w < warps; ++w) sums[s] += of_warp[s][first + w];
    }
}
