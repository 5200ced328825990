// The Python module meg_kernels._C. It takes addresses as integers and knows nothing of torch, so one
// build serves every torch version; meg_kernels/ops/native.py is the side that knows tensors.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "dynamic_neuron.h"

namespace py = pybind11;

namespace {

template <typename Pointer>
Pointer pointer(uintptr_t address) {
    return reinterpret_cast<Pointer>(address);
}

int forward(uintptr_t y, uintptr_t x, uintptr_t key, uintptr_t bias, uintptr_t value, uintptr_t index,
            int64_t M, int64_t d_in, int64_t d_out, int64_t y_stride, int64_t x_stride,
            int64_t key_stride, int64_t value_stride, int64_t tokens_per_index, int64_t dtype,
            int64_t activation, int64_t device, uintptr_t stream) {
    DynamicNeuronArgs args{};
    args.y = pointer<void*>(y);
    args.x = pointer<const void*>(x);
    args.key = pointer<const void*>(key);
    args.bias = pointer<const void*>(bias);
    args.value = pointer<const void*>(value);
    args.index = pointer<const int64_t*>(index);
    args.M = M;
    args.d_in = d_in;
    args.d_out = d_out;
    args.y_stride = y_stride;
    args.x_stride = x_stride;
    args.key_stride = key_stride;
    args.value_stride = value_stride;
    args.tokens_per_index = tokens_per_index;
    args.dtype = static_cast<Dtype>(dtype);
    args.activation = static_cast<Activation>(activation);
    args.device = device;
    args.stream = pointer<void*>(stream);
    return dynamic_neuron_forward(&args);
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
    module.doc() = "CUDA kernels of meg_kernels; csrc/dynamic_neuron.h says what they compute.";
    module.attr("ARCHITECTURES") = architectures();
    module.attr("DTYPES") = py::make_tuple("float32", "float16", "bfloat16");
    module.attr("ACTIVATIONS") = py::make_tuple("identity", "gelu", "gelu_tanh", "silu", "relu");

    // A launch may wait for room in the driver's queue: other Python threads go on meanwhile.
    module.def("dynamic_neuron_forward", &forward, py::call_guard<py::gil_scoped_release>(),
               "Queue the kernel on `stream`; returns a cudaError_t. Null addresses are 0.",
               py::kw_only(), py::arg("y"), py::arg("x"), py::arg("key"), py::arg("bias"),
               py::arg("value"), py::arg("index"), py::arg("M"), py::arg("d_in"), py::arg("d_out"),
               py::arg("y_stride"), py::arg("x_stride"), py::arg("key_stride"),
               py::arg("value_stride"), py::arg("tokens_per_index"), py::arg("dtype"),
               py::arg("activation"), py::arg("device"), py::arg("stream"));
    module.def(
        "error_string",
        [](int code) { return std::string(cudaGetErrorString(static_cast<cudaError_t>(code))); },
        "The CUDA runtime's description of a code.", py::arg("code"));
}
