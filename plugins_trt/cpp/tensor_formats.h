// How TensorRT's data types and formats correspond to those of the kernel table.
#pragma once

#include "kernel_table.h"

#include <NvInferRuntime.h>

#include <optional>

namespace edgeattn
{

inline std::optional<Element> elementOf(nvinfer1::DataType type) noexcept
{
    switch (type)
    {
    case nvinfer1::DataType::kHALF: return Element::kFloat16;
    case nvinfer1::DataType::kBF16: return Element::kBfloat16;
    case nvinfer1::DataType::kFLOAT: return Element::kFloat32;
    default: return std::nullopt;
    }
}

//! Return the layout that a format of a 4-D tensor means for kernels.
//!
//! kHWC is dense for any number of channels, but not every TensorRT has it for other types than FP32. kHWC8, which
//! FP16 and BF16 have, pads the channels to a multiple of 8; it is dense, as kernels need it, where `channels` is one.
inline std::optional<Layout> layoutOf(nvinfer1::TensorFormat format, Element element, int64_t channels) noexcept
{
    if (format == nvinfer1::TensorFormat::kLINEAR)
    {
        return Layout::kLinear;
    }
    bool const isDense = element == Element::kFloat32
        ? format == nvinfer1::TensorFormat::kHWC
        : format == nvinfer1::TensorFormat::kHWC8 && channels > 0 && channels % 8 == 0;
    return isDense ? std::optional<Layout>(Layout::kChannelsLast) : std::nullopt;
}

} // namespace edgeattn
