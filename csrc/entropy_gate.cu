// Launches the entropy gate on the caller's stream. The kernel itself is in entropy_gate.cuh.
#include "entropy_gate.cuh"

#include <algorithm>

#include "launch.cuh"

extern "C" int entropy_gate(const EntropyGate* args) {
    if (args->samples < 0 || args->classes < 0) return cudaErrorInvalidValue;
    const int64_t blocks = std::max<int64_t>(ceil_div(args->samples, kGateWarps), 1);
    return launch_on_device(args->stream, args->dtype, [&](auto zero) {
        return launch(&entropy_gate_kernel<decltype(zero)>, blocks, kGateThreads, *args);
    });
}
