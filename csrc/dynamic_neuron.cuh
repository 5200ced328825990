// The kernel bodies of the dynamic neuron. dynamic_neuron.h states what they compute.
//
// A row of 32 to 256 threads (one threadIdx.y) serves one token, as many as its width keeps busy:
//
//     1. load:   x[m], K[i], y[m] and V[i] all at once, so that their latencies overlap;
//     2. dot:    the threads walk x[m] and K[i] together and sum their products in fp32;
//     3. sum:    shuffles within a warp, then partial sums through shared memory;
//     4. update: every thread now knows h = act(dot + b[i]) and writes y[m] + h * V[i].
//
// Per token that is one read of x and y and one write of out from device memory; K[i] and V[i] are
// shared by all tokens of a query and come from the caches. With 2 flops per 2 bytes the kernel is
// bound by memory: what matters is that loads are wide and many are in flight.
#pragma once

#include "dynamic_neuron.h"
#include "rows.cuh"

// Of the widest blocks on an SM. Leaves 128 registers a thread: 64 hold the first batches of four rows.
constexpr int kMinBlocks = 2;

struct Activated {
    float value, slope;  // act(a) and act'(a)
};

__device__ inline Activated activate(Activation activation, float a) {
    // Where the formulas of gelu and silu have no values, at infinity, and beyond 1e19 where they square,
    // those at +-1024 stand in: 1 or 0, as everywhere from there on. NaN stays NaN.
    constexpr float kSaturated = 1024.0f;
    const float low = a < -kSaturated ? -kSaturated : a;
    const float near = low > kSaturated ? kSaturated : low;
    switch (activation) {
        case Activation::kGelu: {  // a * Phi(a)
            const float below = 0.5f * (1.0f + erff(near * 0.70710678118654752f));
            return {low * below, fmaf(near, 0.39894228040143268f * expf(-0.5f * near * near), below)};
        }
        case Activation::kGeluTanh: {  // a * below, where below approximates Phi(a)
            constexpr float kScale = 0.79788456080286536f, kCubic = 0.044715f;
            const float t = tanhf(kScale * (near + kCubic * near * near * near));
            const float below = 0.5f * (1.0f + t);
            const float inner = kScale * (1.0f + 3.0f * kCubic * near * near);
            return {low * below, fmaf(0.5f * near * (1.0f - t * t), inner, below)};
        }
        case Activation::kSilu: {
            const float gate = 1.0f / (1.0f + expf(-near));
            return {low * gate, gate * (1.0f + near * (1.0f - gate))};
        }
        case Activation::kRelu:  // written so that NaN stays NaN
            return {a < 0.0f ? 0.0f : a, a <= 0.0f ? 0.0f : 1.0f};
        default:
            return {a, 1.0f};
    }
}

// The sum of a row's products once more, in double, by each thread for itself: for a sum in fp32 that
// is not finite. It may have overflowed only on the way.
template <typename T>
__device__ inline float sum_again(const T* a, const T* b, int64_t width) {
    double sum = 0.0;
    for (int64_t j = 0; j < width; ++j) {
        sum += static_cast<double>(to_float(a[j])) * static_cast<double>(to_float(b[j]));
    }
    return static_cast<float>(sum);
}

__device__ inline bool is_finite(float a) { return a - a == 0.0f; }

// The token that a group of threads serves; the last block may have groups without one.
struct Token {
    int64_t m, sample, token;
    bool exists;

    __device__ explicit Token(const DynamicNeuronShape& shape) {
        const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
        // Tokens are counted in 31 bits, and a 32-bit division is several times cheaper.
        const unsigned tokens = static_cast<unsigned>(shape.tokens);
        m = row;
        sample = row / tokens;
        token = row % tokens;
        exists = row < static_cast<unsigned>(shape.samples) * tokens;
    }

    template <typename T>
    __device__ T* row_of(const Rows& rows) const {
        return static_cast<T*>(rows.data) + sample * rows.sample_stride + token * rows.token_stride;
    }
};

template <typename T>
__device__ inline const T* row_of(const Matrix& matrix, int64_t row) {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

template <typename T>
__device__ inline float bias_of(const Neurons& neurons, int64_t i) {
    return neurons.bias ? to_float(static_cast<const T*>(neurons.bias)[i]) : 0.0f;
}

template <typename T>
__device__ inline T add_scaled(T y, float h, T value) {
    return from_float<T>(fmaf(h, to_float(value), to_float(y)));
}

// kVector: every row of every tensor starts on a 16-byte boundary.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kMaxBlockThreads, kMinBlocks)
    dynamic_neuron_kernel(const DynamicNeuronForward args) {
    const Token token(args.shape);
    const int64_t i = token.exists ? args.index[token.sample] : -1;
    const bool edited = i >= 0;
    const Walk<T, kVector> in(args.shape.d_in), out(args.shape.d_out);
    const T* x = token.row_of<const T>(args.x);
    const T* y = token.row_of<const T>(args.y);
    const T* key = row_of<T>(args.neurons.key, i);
    const T* value = row_of<T>(args.neurons.value, i);

    float pre[1] = {0.0f};
    Batch<T, kVector> y_batch, value_batch;
    if (edited) {
        const Batch<T, kVector> x_batch = in.load_token(x, in.thread);
        const Batch<T, kVector> key_batch = in.load_neuron(key, in.thread);
        y_batch = out.load_token(y, out.thread);
        value_batch = out.load_neuron(value, out.thread);
        pre[0] = in.dot_rows(x, key, x_batch, key_batch);
    }
    row_sums(pre);

    T* to = token.row_of<T>(args.out);
    const int64_t j = int64_t{out.chunks} * out.kLanes + out.thread;  // of the tail, by element
    if (edited) {
        if (!is_finite(pre[0])) pre[0] = sum_again(x, key, args.shape.d_in);
        const float h = activate(args.neurons.activation, pre[0] + bias_of<T>(args.neurons, i)).value;
        for (int c = out.thread;;) {
            for (int u = 0; u < out.kChunks; ++u) {
                for (int l = 0; l < out.kLanes; ++l) {
                    T& lane = y_batch.chunk[u].lane[l];
                    lane = add_scaled(lane, h, value_batch.chunk[u].lane[l]);
                }
            }
            out.store(to, c, y_batch);
            c += out.step();
            if (c >= out.chunks) break;
            y_batch = out.load_token(y, c);
            value_batch = out.load_neuron(value, c);
        }
        if (out.thread < out.tail) to[j] = add_scaled(y[j], h, value[j]);
    } else if (token.exists && to != y) {
        for (int c = out.thread; c < out.chunks; c += out.step()) {
            out.store(to, c, out.load_token(y, c));
        }
        if (out.thread < out.tail) to[j] = y[j];
    }
}

// Backward, token by token: dx, and h and dpre for the kernel below.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kMaxBlockThreads, kMinBlocks)
    dynamic_neuron_backward_rows_kernel(const DynamicNeuronBackward args) {
    const Token token(args.shape);
    const int64_t i = token.exists ? args.index[token.sample] : -1;
    const bool edited = i >= 0;
    const Walk<T, kVector> in(args.shape.d_in), out(args.shape.d_out);
    const T* x = token.row_of<const T>(args.x);
    const T* grad = token.row_of<const T>(args.grad);
    const T* key = row_of<T>(args.neurons.key, i);
    const T* value = row_of<T>(args.neurons.value, i);

    float sums[2] = {0.0f, 0.0f};  // x . K and grad . V
    float bias = 0.0f;
    if (edited) {
        const Batch<T, kVector> x_batch = in.load_token(x, in.thread);
        const Batch<T, kVector> key_batch = in.load_neuron(key, in.thread);
        const Batch<T, kVector> grad_batch = out.load_token(grad, out.thread);
        const Batch<T, kVector> value_batch = out.load_neuron(value, out.thread);
        bias = bias_of<T>(args.neurons, i);
        sums[0] = in.dot_rows(x, key, x_batch, key_batch);
        sums[1] = out.dot_rows(grad, value, grad_batch, value_batch);
    }
    row_sums(sums);

    float dpre = 0.0f;
    if (edited) {
        if (!is_finite(sums[0])) sums[0] = sum_again(x, key, args.shape.d_in);
        if (!is_finite(sums[1])) sums[1] = sum_again(grad, value, args.shape.d_out);
        const Activated h = activate(args.neurons.activation, sums[0] + bias);
        dpre = h.slope * sums[1];
        if (args.hidden && in.thread == 0) {
            args.hidden[token.m] = h.value;
            args.dpre[token.m] = dpre;
        }
    }
    if (!args.dx.data || !token.exists) return;
    T* dx = token.row_of<T>(args.dx);
    for (int c = in.thread; c < in.chunks; c += in.step()) {
        Batch<T, kVector> batch;  // of zeros
        if (edited) {
            batch = in.load_neuron(key, c);
            for (Chunk<T>& chunk : batch.chunk) {
                for (T& lane : chunk.lane) lane = from_float<T>(dpre * to_float(lane));
            }
        }
        in.store(dx, c, batch);
    }
    if (in.thread < in.tail) {
        const int64_t j = int64_t{in.chunks} * in.kLanes + in.thread;
        dx[j] = from_float<T>(edited ? dpre * to_float(key[j]) : 0.0f);
    }
}

// ---- gradients of the neurons ---------------------------------------------------------------------
//
// dK[n] and dV[n] are sums of rows, each times its token's dpre or h. A block sums 32 chunks of
// columns of one of them; its warps share the neuron's tokens, each takes every eighth, and their
// sums are added in order at the end. db[n] is a sum of the factors alone and has a block of its own.

constexpr int kNeuronThreads = 256;
constexpr int kNeuronWarps = kNeuronThreads / kWarpSize;
constexpr int kTokensInFlight = 4;  // of a warp

// The blocks of a neuron, in this order.
struct NeuronBlocks {
    unsigned key, value, bias;

    template <typename T>
    static __host__ __device__ NeuronBlocks of(const DynamicNeuronBackward& args) {
        constexpr int64_t kColumns = kWarpSize * Chunk<T>::kLanes;
        const auto blocks = [](int64_t width) {
            return static_cast<unsigned>((width + kColumns - 1) / kColumns);
        };
        return {args.dkey ? blocks(args.shape.d_in) : 0, args.dvalue ? blocks(args.shape.d_out) : 0,
                args.dbias ? 1u : 0u};
    }
    __host__ __device__ unsigned all() const { return key + value + bias; }
};

// The tokens of a neuron's samples, numbered in order.
struct TokensOfNeuron {
    const int64_t* samples;
    unsigned tokens;  // of a sample
    int count;

    __device__ TokensOfNeuron(const DynamicNeuronBackward& args, int64_t neuron)
        : samples(args.order + args.starts[neuron]),
          tokens(static_cast<unsigned>(args.shape.tokens)),
          count(static_cast<int>((args.starts[neuron + 1] - args.starts[neuron]) * args.shape.tokens)) {}

    __device__ int64_t sample(int number) const { return samples[static_cast<unsigned>(number) / tokens]; }
    __device__ int64_t token(int number) const { return static_cast<unsigned>(number) % tokens; }
};

// The columns of dK[n] or dV[n] that a block computes from the tokens' rows and factors.
template <typename T, bool kVector>
__device__ inline void sum_columns(const TokensOfNeuron& tokens, const Rows& rows, const float* factors,
                                   int64_t width, unsigned block, T* sums) {
    constexpr int kLanes = Chunk<T>::kLanes;
    const int warp = threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t first = (int64_t{block} * kWarpSize + lane) * kLanes;  // of this thread's columns
    const int64_t left = width - first;
    const int columns = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;

    float sum[kLanes] = {};
    for (int number = warp; number < tokens.count; number += kNeuronWarps * kTokensInFlight) {
        int64_t sample[kTokensInFlight], token[kTokensInFlight];
        for (int u = 0; u < kTokensInFlight; ++u) {
            const int at = number + u * kNeuronWarps;
            sample[u] = at < tokens.count ? tokens.sample(at) : -1;
            token[u] = tokens.token(at);
        }
        Chunk<T> chunk[kTokensInFlight];
        float factor[kTokensInFlight] = {};
        for (int u = 0; u < kTokensInFlight; ++u) {
            if (sample[u] < 0) continue;
            const T* row = static_cast<const T*>(rows.data) + sample[u] * rows.sample_stride +
                           token[u] * rows.token_stride + first;
            factor[u] = factors[sample[u] * tokens.tokens + token[u]];
            chunk[u] = columns == kLanes ? load_chunk<kVector, Access::kPassBy>(row)
                                         : load_lanes(row, columns);
        }
        for (int u = 0; u < kTokensInFlight; ++u) {
            for (int l = 0; l < kLanes; ++l) sum[l] = fmaf(factor[u], to_float(chunk[u].lane[l]), sum[l]);
        }
    }

    __shared__ float of_warp[kNeuronWarps][kLanes][kWarpSize];
    for (int l = 0; l < kLanes; ++l) of_warp[warp][l][lane] = sum[l];
    __syncthreads();
    if (warp != 0) return;
    Chunk<T> chunk;
    for (int l = 0; l < kLanes; ++l) {
        float total = 0.0f;
        for (int w = 0; w < kNeuronWarps; ++w) total += of_warp[w][l][lane];
        chunk.lane[l] = from_float<T>(total);
    }
    if (columns == kLanes) {
        store_chunk<kVector>(sums + first, chunk);
    } else {
        store_lanes(sums + first, chunk, columns);
    }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kNeuronThreads)
    dynamic_neuron_backward_neurons_kernel(const DynamicNeuronBackward args) {
    const NeuronBlocks blocks = NeuronBlocks::of<T>(args);
    const int64_t n = blockIdx.x / blocks.all();
    const unsigned block = blockIdx.x % blocks.all();
    const TokensOfNeuron tokens(args, n);
    if (block < blocks.key + blocks.value) {
        const bool of_key = block < blocks.key;
        const int64_t width = of_key ? args.shape.d_in : args.shape.d_out;
        T* gradients = static_cast<T*>(of_key ? args.dkey : args.dvalue);
        sum_columns<T, kVector>(tokens, of_key ? args.x : args.grad, of_key ? args.dpre : args.hidden,
                                width, of_key ? block : block - blocks.key, gradients + n * width);
    } else {
        float sum[1] = {0.0f};
        for (int at = threadIdx.x; at < tokens.count; at += kNeuronThreads) {
            sum[0] += args.dpre[tokens.sample(at) * tokens.tokens + tokens.token(at)];
        }
        row_sums(sum);
        if (threadIdx.x == 0) static_cast<T*>(args.dbias)[n] = from_float<T>(sum[0]);
    }
}
