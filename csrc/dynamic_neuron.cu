// Launches the dynamic neuron on the caller's stream. The kernels themselves are in dynamic_neuron.cuh.
#include "dynamic_neuron.cuh"

#include <algorithm>

#include "launch.cuh"

namespace {

bool is_valid(const DynamicNeuronShape& shape, const Neurons& neurons) {
    return shape.samples <= INT32_MAX && shape.tokens <= INT32_MAX &&
           shape.samples * shape.tokens <= INT32_MAX && shape.d_in >= 0 && shape.d_in <= INT32_MAX &&
           shape.d_out <= INT32_MAX && neurons.activation >= Activation::kIdentity &&
           neurons.activation <= Activation::kRelu;
}

// As many threads a row as its first batch keeps busy; narrow rows share a block. The choice depends
// on the row's width alone, never on the batch: it decides in which order sums are formed.
template <typename T>
dim3 block_of(const DynamicNeuronShape& shape) {
    const int64_t threads = ceil_div(std::max(shape.d_in, shape.d_out), kBatch<true> * Chunk<T>::kLanes);
    for (unsigned x : {32, 64, 128}) {
        if (threads <= x) return dim3(x, 128 / x);
    }
    return dim3(256);
}

template <typename T, typename Args>
cudaError_t launch_rows(void (*kernel)(const Args), const Args& args) {
    const dim3 block = block_of<T>(args.shape);
    return launch(kernel, ceil_div(args.shape.samples * args.shape.tokens, block.y), block, args);
}

template <typename T>
cudaError_t launch_neurons(const DynamicNeuronBackward& args, bool vector) {
    const int64_t blocks = args.shape.neurons * NeuronBlocks::of<T>(args).all();
    if (blocks == 0) return cudaSuccess;
    return launch(vector ? &dynamic_neuron_backward_neurons_kernel<T, true>
                         : &dynamic_neuron_backward_neurons_kernel<T, false>,
                  blocks, kNeuronThreads, args);
}

// With any misaligned row, all rows take the scalar loads: one decision for the launch.
template <typename T>
bool is_vector(const DynamicNeuronForward& args) {
    constexpr int64_t kSize = sizeof(T);
    return is_aligned(args.out, kSize) && is_aligned(args.y, kSize) && is_aligned(args.x, kSize) &&
           is_aligned(args.neurons.key, kSize) && is_aligned(args.neurons.value, kSize);
}

template <typename T>
bool is_vector(const DynamicNeuronBackward& args) {
    constexpr int64_t kSize = sizeof(T);
    return is_aligned(args.grad, kSize) && is_aligned(args.x, kSize) &&
           is_aligned(args.neurons.key, kSize) && is_aligned(args.neurons.value, kSize) &&
           is_aligned(args.dx, kSize) && is_aligned(Matrix{args.dkey, args.shape.d_in}, kSize) &&
           is_aligned(Matrix{args.dvalue, args.shape.d_out}, kSize);
}

}  // namespace

extern "C" int dynamic_neuron_forward(const DynamicNeuronForward* args) {
    const DynamicNeuronShape& shape = args->shape;
    if (shape.samples <= 0 || shape.tokens <= 0 || shape.d_out <= 0) return cudaSuccess;
    if (!is_valid(shape, args->neurons)) return cudaErrorInvalidValue;
    return launch_on_device(args->stream, shape.dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_rows<T>(is_vector<T>(*args) ? &dynamic_neuron_kernel<T, true>
                                                  : &dynamic_neuron_kernel<T, false>,
                              *args);
    });
}

extern "C" int dynamic_neuron_backward(const DynamicNeuronBackward* args) {
    const DynamicNeuronShape& shape = args->shape;
    if (!is_valid(shape, args->neurons)) return cudaErrorInvalidValue;
    return launch_on_device(args->stream, shape.dtype, [&](auto zero) {
        using T = decltype(zero);
        const bool vector = is_vector<T>(*args);
        cudaError_t error = cudaSuccess;
        if (shape.samples > 0 && shape.tokens > 0) {
            error = launch_rows<T>(vector ? &dynamic_neuron_backward_rows_kernel<T, true>
                                          : &dynamic_neuron_backward_rows_kernel<T, false>,
                                   *args);
        }
        return error != cudaSuccess ? error : launch_neurons<T>(*args, vector);
    });
}
