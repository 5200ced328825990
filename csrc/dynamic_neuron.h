// The dynamic neuron, forward:
//
//     y[m, :] += act(sum_j x[m, j] * K[i, j] + b[i]) * V[i, :]     i = index[m / tokens_per_index]
//
// One extra feed-forward neuron per query: key K[i], bias b[i], value V[i]. Rows with i = -1 belong
// to queries without a neuron; their y is neither read nor written. Section 3 of arXiv 2512.14395.
//
// This header is all that a caller needs: no CUDA, no torch, no Python in it.
#pragma once

#include <cstdint>

// The codes are positions in the tuples DTYPES and ACTIVATIONS of the Python module.
enum class Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Activation : int64_t { kIdentity = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

// Every field is 8 bytes wide, so the layout has no padding and is easy to mirror elsewhere.
// Strides count elements between rows; inside a row elements are adjacent. y overlaps nothing else.
struct DynamicNeuronArgs {
    void* y;               // [M, d_out]   updated in place
    const void* x;         // [M, d_in]
    const void* key;       // [N, d_in]
    const void* bias;      // [N], or null for no bias
    const void* value;     // [N, d_out]
    const int64_t* index;  // [ceil(M / tokens_per_index)], each -1 or in [0, N): not checked here
    int64_t M, d_in, d_out;
    int64_t y_stride, x_stride, key_stride, value_stride;
    int64_t tokens_per_index;  // 1 for packed tokens, T for a [B, T] batch with one index per sample
    Dtype dtype;               // of y, x, key, bias and value alike; sums are fp32
    Activation activation;
    int64_t device;  // ordinal of the device that holds all of the above
    void* stream;    // cudaStream_t to launch on
};

// Queues the kernel and returns at once. The result is a cudaError_t: 0 is success, and an empty
// batch is a success that launches nothing.
extern "C" int dynamic_neuron_forward(const DynamicNeuronArgs* args);
