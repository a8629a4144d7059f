/* The op qlazy::few_tokens as PyTorch calls it on a CPU: a model of 200 layers would spend a tenth of a token's time in Python on the way
 * to its products. Written against PyTorch's stable ABI alone. What calls it has made sure that the loops take the weight.
 */
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "arguments.h"
#include <optional>
#include <vector>

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

int64_t dtype_of(const Tensor &tensor) {
    switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::BFloat16: return BFLOAT16;
    case torch::headeronly::ScalarType::Half: return FLOAT16;
    case torch::headeronly::ScalarType::Float: return FLOAT32;
    default: STD_TORCH_CHECK(false, "qlazy::few_tokens takes bfloat16, float16 and float32 alone.");
    }
}

template <class T> const T *address(const Maybe &tensor) {
    return tensor ? static_cast<const T *>(tensor->const_data_ptr()) : nullptr;
}

Tensor few_tokens(
    Tensor given, Tensor packed, Tensor scale, Maybe zero, Maybe nested_absmax, Maybe nested_offset, Maybe nested_code, Maybe code,
    Maybe bias, int64_t kind, int64_t rows, int64_t group) {
    const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const int64_t last = x.dim() - 1, columns = x.size(last);
    STD_TORCH_CHECK(columns > 0, "qlazy::few_tokens takes at least one column.");
    STD_TORCH_CHECK(!bias || bias->numel() == rows, "qlazy::few_tokens takes a bias of ", rows, " numbers.");
    if (bias && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    const int64_t tokens = x.numel() / columns;
    std::vector<int64_t> sizes(last + 1), strides(last + 1, 1);
    for (int64_t i = 0; i <= last; i++) sizes[i] = i == last ? rows : x.size(i);
    for (int64_t i = last; i > 0; i--) strides[i - 1] = strides[i] * (sizes[i] ? sizes[i] : 1);
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        last + 1, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
    Tensor y(made);
    if (tokens == 0) return y;
    const qlazy_product product = {
        static_cast<const uint8_t *>(packed.const_data_ptr()), scale.const_data_ptr(), address<int32_t>(zero),
        address<float>(nested_absmax), address<float>(nested_offset), address<float>(nested_code), address<float>(code),
        x.const_data_ptr(), address<void>(bias), y.mutable_data_ptr(),
        kind, nested_absmax ? FLOAT32 : dtype_of(scale) /* a nested absmax is bytes, and the loops do not ask */, dtype_of(x), bias ? dtype_of(*bias) : 0,
        tokens, rows, columns, group, torch::stable::get_num_threads()};
    STD_TORCH_CHECK(qlazy_linear(&product) == 0, "qlazy::few_tokens has no memory for its ", tokens, " tokens.");
    return y;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(qlazy, CPU, library) { library.impl("few_tokens", TORCH_BOX(&few_tokens)); }
