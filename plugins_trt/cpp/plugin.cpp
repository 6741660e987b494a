#include "logging.h"

#include "plugin.h"
#include "tensor_formats.h"

#include <algorithm>
#include <cstring>

namespace edgeattn
{
namespace
{

constexpr int32_t kSuccess = 0;
constexpr int32_t kFailure = 1;
constexpr char const* kHashField = "kernel_table";

Shape shapeOf(nvinfer1::Dims const& dims) noexcept
{
    return {dims.d, std::max(dims.nbDims, 0)};
}

//! Return data type and layout of a call from the tensors that are known; throw Error when they do not go together.
//!
//! `describe(i)` gives the description of tensor i of inputs and outputs. Numbers of channels are taken from `sizes`,
//! because an output's own may not be known while formats are chosen.
template <typename Describe>
std::pair<Element, Layout> kindOf(
    Signature const& signature, int32_t count, Sizes const& sizes, Describe const& describe)
{
    std::optional<Element> const element = elementOf(describe(0).type);
    if (!element)
    {
        throw Error("its type is none of FP16, BF16 and FP32");
    }
    std::optional<Layout> layout;
    for (int32_t index = 0; index < count; ++index)
    {
        bool const isInput = index < signature.inputs.size;
        Tensor const& tensor = isInput ? signature.inputs[static_cast<size_t>(index)]
                                       : signature.outputs[static_cast<size_t>(index - signature.inputs.size)];
        nvinfer1::PluginTensorDesc const& desc = describe(index);
        int32_t const symbol = tensor.isMap() ? tensor.axes[1] : kAxisOfOne;
        int64_t const channels = symbol == kAxisOfOne ? 1 : sizes[static_cast<size_t>(symbol)];
        std::optional<Layout> const own = layoutOf(desc.format, *element, channels);
        bool const fits = own && desc.type == describe(0).type
            && (tensor.isMap() ? *own == layout.value_or(*own) : *own == Layout::kLinear);
        if (!fits)
        {
            throw Error(std::string(tensor.name) + " has another type or format than its kernels take");
        }
        if (tensor.isMap())
        {
            layout = own;
        }
    }
    return {*element, layout.value_or(Layout::kLinear)};
}

//! Sizes as far as the shapes of the first tensors tell, and which of them the shapes have named.
struct PartialSizes
{
    Sizes sizes;
    std::vector<bool> seen;
};

PartialSizes partialSizesOf(Signature const& signature, nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t count)
{
    auto const symbols = static_cast<size_t>(signature.symbols.size);
    PartialSizes partial{Sizes(symbols, kUnknown), std::vector<bool>(symbols, false)};
    for (int32_t index = 0; index < std::min(count, signature.inputs.size); ++index)
    {
        Span<int32_t> const& axes = signature.inputs[static_cast<size_t>(index)].axes;
        nvinfer1::Dims const& dims = inputs[index].desc.dims;
        for (int32_t axis = 0; axis < std::min(axes.size, dims.nbDims); ++axis)
        {
            int32_t const symbol = axes[static_cast<size_t>(axis)];
            if (symbol != kAxisOfOne)
            {
                auto const position = static_cast<size_t>(symbol);
                partial.seen[position] = true;
                partial.sizes[position] = std::max(partial.sizes[position], dims.d[axis]);
            }
        }
    }
    return partial;
}

bool hasSeenStaticSizes(Signature const& signature, PartialSizes const& partial)
{
    return std::all_of(signature.staticSymbols.begin(), signature.staticSymbols.end(),
        [&](int32_t symbol) { return partial.seen[static_cast<size_t>(symbol)]; });
}

} // namespace

OperationPlugin::OperationPlugin(Operation const& operation) noexcept
    : operation_(operation)
    , field_(kHashField, kTable.hash, nvinfer1::PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(kTable.hash)))
    , fields_{1, &field_}
{
}

nvinfer1::IPluginCapability* OperationPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* OperationPlugin::clone() noexcept
{
    return new (std::nothrow) OperationPlugin(operation_);
}

nvinfer1::AsciiChar const* OperationPlugin::getPluginName() const noexcept
{
    return operation_.opType;
}

nvinfer1::AsciiChar const* OperationPlugin::getPluginVersion() const noexcept
{
    return kTable.pluginVersion;
}

nvinfer1::AsciiChar const* OperationPlugin::getPluginNamespace() const noexcept
{
    return kTable.pluginNamespace;
}

int32_t OperationPlugin::getNbOutputs() const noexcept
{
    return operation_.signatures[0].outputs.size;
}

char const* OperationPlugin::getTimingCacheID() noexcept
{
    return kTable.hash;
}

int32_t OperationPlugin::getFormatCombinationLimit() noexcept
{
    return kElementCount * kLayoutCount;
}

nvinfer1::PluginFieldCollection const* OperationPlugin::getFieldsToSerialize() noexcept
{
    return &fields_;
}

nvinfer1::IPluginV3* OperationPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept
{
    return clone();
}

Signature const& OperationPlugin::signatureFor(int32_t nbInputs, int32_t nbOutputs) const
{
    Signature const& signature = signatureOf(operation_, nbInputs);
    if (signature.outputs.size != nbOutputs)
    {
        throw Error("it has " + std::to_string(nbOutputs) + " outputs, but gives "
            + std::to_string(signature.outputs.size));
    }
    return signature;
}

void OperationPlugin::warnOnce(Severity severity, std::string const& message)
{
    if (warnings_.insert(message).second)
    {
        log(severity, std::string(operation_.opType) + ": " + message + ".");
    }
}

int32_t OperationPlugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    return guarded(operation_.opType, kFailure, [&] {
        signatureFor(nbInputs, nbOutputs);
        return kSuccess;
    });
}

int32_t OperationPlugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
    nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept
{
    return guarded(operation_.opType, kFailure, [&] {
        signatureFor(nbInputs, nbOutputs);
        if (!std::all_of(inputTypes, inputTypes + nbInputs, [&](auto type) { return type == inputTypes[0]; }))
        {
            throw Error("its inputs have different types; cast them to one");
        }
        std::fill_n(outputTypes, nbOutputs, inputTypes[0]);
        return kSuccess;
    });
}

int32_t OperationPlugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
    nvinfer1::DimsExprs const*, int32_t, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
    nvinfer1::IExprBuilder& exprBuilder) noexcept
{
    return guarded(operation_.opType, kFailure, [&] {
        Signature const& signature = signatureFor(nbInputs, nbOutputs);
        std::vector<nvinfer1::IDimensionExpr const*> sizes(static_cast<size_t>(signature.symbols.size), nullptr);
        for (int32_t index = 0; index < nbInputs; ++index)
        {
            Tensor const& tensor = signature.inputs[static_cast<size_t>(index)];
            if (inputs[index].nbDims != tensor.axes.size)
            {
                throw Error(std::string(tensor.name) + " has " + std::to_string(inputs[index].nbDims)
                    + " axes, but needs " + std::to_string(tensor.axes.size));
            }
            for (int32_t axis = 0; axis < tensor.axes.size; ++axis)
            {
                int32_t const symbol = tensor.axes[static_cast<size_t>(axis)];
                if (symbol != kAxisOfOne && sizes[static_cast<size_t>(symbol)] == nullptr)
                {
                    sizes[static_cast<size_t>(symbol)] = inputs[index].d[axis];
                }
            }
        }
        for (int32_t index = 0; index < nbOutputs; ++index)
        {
            Span<int32_t> const& axes = signature.outputs[static_cast<size_t>(index)].axes;
            outputs[index].nbDims = axes.size;
            for (int32_t axis = 0; axis < axes.size; ++axis)
            {
                int32_t const symbol = axes[static_cast<size_t>(axis)];
                outputs[index].d[axis]
                    = symbol == kAxisOfOne ? exprBuilder.constant(1) : sizes[static_cast<size_t>(symbol)];
            }
        }
        return kSuccess;
    });
}

bool OperationPlugin::supportsFormatCombination(
    int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return guarded(operation_.opType, false, [&] {
        Signature const& signature = signatureFor(nbInputs, nbOutputs);
        PartialSizes const partial = partialSizesOf(signature, inOut, pos + 1);
        std::pair<Element, Layout> kind;
        try
        {
            kind = kindOf(
                signature, pos + 1, partial.sizes, [&](int32_t index) -> auto const& { return inOut[index].desc; });
        }
        catch (Error const&) // TensorRT tries every type and format; a refusal is no error
        {
            return false;
        }
        auto const& [element, layout] = kind;
        if (!hasSeenStaticSizes(signature, partial))
        {
            return true; // decided at a later tensor, where everything that the choice depends on is known
        }
        if (!rowsFor(signature, element, layout, partial.sizes).empty())
        {
            return true;
        }
        // A type or layout that was not compiled may be what TensorRT only tries; sizes that were not are a dead end.
        bool const hasOtherKind = std::any_of(signature.rows.begin(), signature.rows.end(),
            [&](Row const& row) { return hasStaticSizes(signature, row, partial.sizes); });
        warnOnce(hasOtherKind ? Severity::kWARNING : Severity::kERROR,
            missingKernel(operation_, signature, element, layout, partial.sizes));
        return false;
    });
}

size_t OperationPlugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
    nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept
{
    return guarded(operation_.opType, size_t{0}, [&] {
        Signature const& signature = signatureFor(nbInputs, nbOutputs);
        std::vector<Shape> shapes;
        std::transform(inputs, inputs + nbInputs, std::back_inserter(shapes),
            [](nvinfer1::DynamicPluginTensorDesc const& input) { return shapeOf(input.max); });
        Sizes const sizes = sizesOf(signature, shapes);
        auto const [element, layout] = kindOf(signature, nbInputs + nbOutputs, sizes,
            [&](int32_t index)
                -> auto const& { return index < nbInputs ? inputs[index].desc : outputs[index - nbInputs].desc; });
        // The most that any architecture's tiling needs: an engine may run on another GPU than the one it was built on.
        return largestWorkspace(rowsFor(signature, element, layout, sizes), sizes);
    });
}

int32_t OperationPlugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
    nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept
{
    return guarded(operation_.opType, kFailure, [&] {
        request_.reset();
        Signature const& signature = signatureFor(nbInputs, nbOutputs);
        std::vector<Shape> shapes;
        std::transform(in, in + nbInputs, std::back_inserter(shapes),
            [](nvinfer1::PluginTensorDesc const& input) { return shapeOf(input.dims); });
        Sizes const sizes = sizesOf(signature, shapes);
        auto const [element, layout] = kindOf(signature, nbInputs + nbOutputs, sizes,
            [&](int32_t index) -> auto const& { return index < nbInputs ? in[index] : out[index - nbInputs]; });
        Request request = requestFor(operation_, signature, sizes, element, layout);
        prepared_.reset();
        request_ = std::move(request);
        try
        {
            if (threadHasContext()) // else enqueue takes the stream's
            {
                prepareFor(ContextScope(nullptr).id());
            }
        }
        catch (Error const&)
        {
            request_.reset();
            throw;
        }
        return kSuccess;
    });
}

void OperationPlugin::prepareFor(unsigned long long contextId)
{
    prepared_ = prepare(*request_, contextId);
    if (!prepared_->code.remark.empty())
    {
        warnOnce(Severity::kWARNING, prepared_->code.remark);
    }
}

int32_t OperationPlugin::enqueue(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    return guarded(operation_.opType, kFailure, [&] {
        if (!request_)
        {
            throw Error("enqueue without a successful onShapeChange");
        }
        ContextScope const context(stream);
        if (!prepared_ || prepared_->contextId != context.id())
        {
            prepareFor(context.id());
        }
        launchAll(*request_, *prepared_, inputs, outputs, workspace, stream);
        return kSuccess;
    });
}

OperationCreator::OperationCreator(Operation const& operation) noexcept
    : operation_(operation)
    , noFields_{0, nullptr}
{
}

nvinfer1::IPluginV3* OperationCreator::createPlugin(nvinfer1::AsciiChar const*,
    nvinfer1::PluginFieldCollection const* fc, nvinfer1::TensorRTPhase phase) noexcept
{
    return guarded(operation_.opType, static_cast<nvinfer1::IPluginV3*>(nullptr), [&]() -> nvinfer1::IPluginV3* {
        if (phase == nvinfer1::TensorRTPhase::kRUNTIME)
        {
            std::string built = "unknown";
            for (int32_t index = 0; fc != nullptr && index < fc->nbFields; ++index)
            {
                nvinfer1::PluginField const& field = fc->fields[index];
                if (std::strcmp(field.name, kHashField) == 0 && field.data != nullptr && field.length > 0)
                {
                    built.assign(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
                }
            }
            if (built != kTable.hash)
            {
                throw Error("the engine was built with the kernel table " + built + ", but this plugin library holds "
                    + kTable.hash + ". Load the library that the engine was built with, or build the engine again");
            }
        }
        return new OperationPlugin(operation_);
    });
}

nvinfer1::PluginFieldCollection const* OperationCreator::getFieldNames() noexcept
{
    return &noFields_;
}

nvinfer1::AsciiChar const* OperationCreator::getPluginName() const noexcept
{
    return operation_.opType;
}

nvinfer1::AsciiChar const* OperationCreator::getPluginVersion() const noexcept
{
    return kTable.pluginVersion;
}

nvinfer1::AsciiChar const* OperationCreator::getPluginNamespace() const noexcept
{
    return kTable.pluginNamespace;
}

} // namespace edgeattn
