// The entropy of a softmax: how uncertain a classifier is about each row of a batch, in nats.
//
//     entropy[b] = -sum_c p[b, c] log p[b, c],   p[b] = softmax(logits[b])
//
// A class of probability 0 adds nothing. The entropy is NaN for a row that holds a NaN or +infinity, or
// nothing but -infinity. A row's bits depend on that row alone. The familiarity gate of arXiv 2512.14395,
// section 3.4, compares this entropy with a threshold.
#pragma once

#include "types.h"

struct SoftmaxEntropy {
    Matrix logits;  // [samples, classes]
    int64_t samples, classes;
    Dtype dtype;     // of the logits; sums are fp32
    float* entropy;  // [samples]
    Stream stream;
};

// Queues one kernel and returns at once. The result is a cudaError_t: 0 is success, and so is an empty
// batch, for which nothing is queued.
extern "C" int softmax_entropy(const SoftmaxEntropy* args);
