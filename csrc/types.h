// What callers and kernels share: the codes of dtypes and activations, and where data stands. Plain
// C++: no CUDA, no torch, no Python.
//
// Every field of every struct is 8 bytes wide, so there is no padding and layouts are easy to mirror.
#pragma once

#include <cstdint>

// The codes are positions in the tuples DTYPES and ACTIVATIONS of the Python module.
enum class Dtype : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Activation : int64_t { kIdentity = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3, kRelu = 4 };

// A tensor [samples, tokens, width]. Strides count elements; inside a row elements are adjacent.
struct Rows {
    void* data;
    int64_t sample_stride, token_stride;
};

// A tensor [rows, width]. The stride counts elements; inside a row elements are adjacent.
struct Matrix {
    void* data;
    int64_t row_stride;
};

// Where a kernel is queued.
struct Stream {
    int64_t device;  // ordinal of the device that holds every tensor of the call
    void* handle;    // its cudaStream_t
};
