// The familiarity gate: which rows of a classifier's logits are certain enough to be edited.
//
//     entropy[b] = -sum_c p[b, c] log p[b, c],   p[b] = softmax(logits[b])            in nats
//     row b is edited  <=>  entropy[b] < threshold                                    NaN is not
//
// and the compaction that follows, on the device, so that nobody waits for a count:
//
//     index[b] = rank of b among the edited rows, or -1
//     rows[k]  = the k-th edited row for k < count, then -1
//     count    = how many rows are edited
//
// index is what the dynamic neuron takes once neuron k has been generated for row rows[k]. Section 3.3
// of arXiv 2512.14395.
#pragma once

#include "types.h"

struct EntropyGate {
    const void* logits;  // [samples, classes]
    int64_t row_stride;  // in elements; inside a row elements are adjacent
    int64_t samples, classes;
    Dtype dtype;
    double threshold;  // in nats; compared as float
    float* entropy;    // [samples]
    int64_t* index;    // [samples]
    int64_t* rows;     // [samples]
    int64_t* count;    // [1]
    int32_t* counter;  // [1]: 0 before and, once the kernel is through, after. Of one stream at a time
    Stream stream;
};

// Queues one kernel and returns at once. The result is a cudaError_t: 0 is success. An empty batch
// has a count too: 0.
extern "C" int entropy_gate(const EntropyGate* args);
