// Launches the softmax's entropy on the caller's stream. The kernel itself is in softmax_entropy.cuh.
#include "softmax_entropy.cuh"

#include "launch.cuh"

extern "C" int softmax_entropy(const SoftmaxEntropy* args) {
    if (args->samples < 0 || args->classes < 0) return cudaErrorInvalidValue;
    if (args->samples == 0) return cudaSuccess;
    const int64_t blocks = ceil_div(args->samples, kEntropyWarps);
    return launch_on_device(args->stream, args->dtype, [&](auto zero) {
        return launch(&softmax_entropy_kernel<decltype(zero)>, blocks, kEntropyThreads, *args);
    });
}
