// The dynamic neuron: one extra feed-forward neuron per query, key K[i], bias b[i], value V[i].
//
//     out[s, t, :] = y[s, t, :] + h[s, t] * V[i, :]                                   i = index[s]
//     h[s, t] = act(pre[s, t]),   pre[s, t] = sum_j x[s, t, j] * K[i, j] + b[i]
//
// Samples with i = -1 have no neuron: their rows keep the bits of y. Section 3 of arXiv 2512.14395.
// A batch of packed tokens [M, d] with one index each is M samples of one token.
//
// With g = dL/dout, which is dL/dy too, the gradients are
//
//     dpre[s, t] = act'(pre[s, t]) * (g[s, t, :] . V[i, :])
//     dx[s, t, :] = dpre[s, t] * K[i, :]                      0 for samples without a neuron
//     dK[n, :] = sum dpre[s, t] * x[s, t, :]                  over the tokens of all s with index n
//     db[n]    = sum dpre[s, t]
//     dV[n, :] = sum h[s, t] * g[s, t, :]
//
// Nothing is atomic: the same inputs give the same bits, and so does a row or a neuron whatever else
// is in the batch.
#pragma once

#include "types.h"

struct Neurons {
    Matrix key;        // [N, d_in]
    const void* bias;  // [N], or null for none
    Matrix value;      // [N, d_out]
    Activation activation;
};

struct DynamicNeuronShape {
    int64_t samples, tokens, neurons, d_in, d_out;
    Dtype dtype;  // of every tensor but the index; sums are fp32
};

// out is y itself (the same address and strides: rows without a neuron are neither read nor written)
// or overlaps nothing else.
struct DynamicNeuronForward {
    Rows out, y;           // [samples, tokens, d_out]
    Rows x;                // [samples, tokens, d_in]
    Neurons neurons;       // read only
    const int64_t* index;  // [samples], each -1 or in [0, N): not checked here
    DynamicNeuronShape shape;
    Stream stream;
};

// A gradient whose address is null is not computed. order and starts say who uses which neuron, and
// with the scratch they are needed for dkey, dbias and dvalue only.
struct DynamicNeuronBackward {
    Rows grad;             // [samples, tokens, d_out]
    Rows x;                // [samples, tokens, d_in]
    Neurons neurons;
    const int64_t* index;  // [samples]
    DynamicNeuronShape shape;
    Stream stream;
    Rows dx;               // [samples, tokens, d_in]
    void* dkey;            // [N, d_in], contiguous
    void* dbias;           // [N]
    void* dvalue;          // [N, d_out], contiguous
    float* hidden;         // [samples * tokens] scratch: h
    float* dpre;           // [samples * tokens] scratch
    const int64_t* order;  // [samples]: samples sorted by neuron, and among equals by number
    const int64_t* starts; // [N + 1]: neuron n's samples are order[starts[n]] to order[starts[n + 1] - 1]
};

// Both queue their kernels and return at once. The result is a cudaError_t: 0 is success, and an
// empty batch is a success that writes nothing but zero gradients.
extern "C" int dynamic_neuron_forward(const DynamicNeuronForward* args);
extern "C" int dynamic_neuron_backward(const DynamicNeuronBackward* args);
