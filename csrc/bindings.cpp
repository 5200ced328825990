// The Python module meg_kernels._C. It takes addresses as integers and knows nothing of torch, so one
// build serves every torch version; meg_kernels/ops/native.py is the side that knows tensors.
//
// The structs of the headers arrive as tuples of their fields, in order; a null address is 0.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <tuple>

#include "dynamic_neuron.h"
#include "softmax_entropy.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using RowsTuple = std::tuple<Address, int64_t, int64_t>;
using MatrixTuple = std::tuple<Address, int64_t>;
using NeuronsTuple = std::tuple<MatrixTuple, Address, MatrixTuple, int64_t>;
using ShapeTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using StreamTuple = std::tuple<int64_t, Address>;

template <typename Pointer>
Pointer pointer(Address address) {
    return reinterpret_cast<Pointer>(address);
}

Rows rows(const RowsTuple& fields) {
    const auto [data, sample_stride, token_stride] = fields;
    return {pointer<void*>(data), sample_stride, token_stride};
}

Matrix matrix(const MatrixTuple& fields) {
    const auto [data, row_stride] = fields;
    return {pointer<void*>(data), row_stride};
}

Neurons neurons(const NeuronsTuple& fields) {
    const auto& [key, bias, value, activation] = fields;
    return {matrix(key), pointer<const void*>(bias), matrix(value), static_cast<Activation>(activation)};
}

DynamicNeuronShape shape(const ShapeTuple& fields) {
    const auto [samples, tokens, count, d_in, d_out, dtype] = fields;
    return {samples, tokens, count, d_in, d_out, static_cast<Dtype>(dtype)};
}

Stream stream(const StreamTuple& fields) {
    const auto [device, handle] = fields;
    return {device, pointer<void*>(handle)};
}

int forward(const RowsTuple& out, const RowsTuple& y, const RowsTuple& x, const NeuronsTuple& of,
            Address index, const ShapeTuple& sizes, const StreamTuple& on) {
    const DynamicNeuronForward args{rows(out),    rows(y), rows(x), neurons(of), pointer<int64_t*>(index),
                                    shape(sizes), stream(on)};
    return dynamic_neuron_forward(&args);
}

using GradientsTuple = std::tuple<RowsTuple, Address, Address, Address>;  // dx, dkey, dbias, dvalue
using ScratchTuple = std::tuple<Address, Address, Address, Address>;      // hidden, dpre, order, starts

int backward(const RowsTuple& grad, const RowsTuple& x, const NeuronsTuple& of, Address index,
             const ShapeTuple& sizes, const StreamTuple& on, const GradientsTuple& gradients,
             const ScratchTuple& scratch) {
    const auto& [dx, dkey, dbias, dvalue] = gradients;
    const auto [hidden, dpre, order, starts] = scratch;
    const DynamicNeuronBackward args{rows(grad),
                                     rows(x),
                                     neurons(of),
                                     pointer<int64_t*>(index),
                                     shape(sizes),
                                     stream(on),
                                     rows(dx),
                                     pointer<void*>(dkey),
                                     pointer<void*>(dbias),
                                     pointer<void*>(dvalue),
                                     pointer<float*>(hidden),
                                     pointer<float*>(dpre),
                                     pointer<int64_t*>(order),
                                     pointer<int64_t*>(starts)};
    return dynamic_neuron_backward(&args);
}

using EntropyShapeTuple = std::tuple<int64_t, int64_t, int64_t>;  // samples, classes, dtype

int entropy(const MatrixTuple& logits, const EntropyShapeTuple& sizes, Address result,
            const StreamTuple& on) {
    const auto [samples, classes, dtype] = sizes;
    const SoftmaxEntropy args{
        matrix(logits), samples, classes, static_cast<Dtype>(dtype), pointer<float*>(result), stream(on)};
    return softmax_entropy(&args);
}

// "sm_80 sm_90a" -> ("sm_80", "sm_90a")
py::tuple architectures() {
    std::istringstream words(MEG_KERNELS_CUDA_ARCHS);
    py::list names;
    for (std::string word; words >> word;) names.append(word);
    return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of meg_kernels; the headers of csrc/ say what they compute.";
    module.attr("ARCHITECTURES") = architectures();
    module.attr("DTYPES") = py::make_tuple("float32", "float16", "bfloat16");
    module.attr("ACTIVATIONS") = py::make_tuple("identity", "gelu", "gelu_tanh", "silu", "relu");

    // A launch may wait for room in the driver's queue: other Python threads go on meanwhile.
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("dynamic_neuron_forward", &forward, Unlocked(),
               "Queue dynamic_neuron_forward; returns a cudaError_t.", py::arg("out"), py::arg("y"),
               py::arg("x"), py::arg("neurons"), py::arg("index"), py::arg("shape"), py::arg("stream"));
    module.def("dynamic_neuron_backward", &backward, Unlocked(),
               "Queue dynamic_neuron_backward; returns a cudaError_t.", py::arg("grad"), py::arg("x"),
               py::arg("neurons"), py::arg("index"), py::arg("shape"), py::arg("stream"),
               py::arg("gradients"), py::arg("scratch"));
    module.def("softmax_entropy", &entropy, Unlocked(), "Queue softmax_entropy; returns a cudaError_t.",
               py::arg("logits"), py::arg("shape"), py::arg("entropy"), py::arg("stream"));
    module.def(
        "error_string",
        [](int code) { return std::string(cudaGetErrorString(static_cast<cudaError_t>(code))); },
        "The CUDA runtime's description of a code.", py::arg("code"));
}
