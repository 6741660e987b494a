#include "plan.h"

#include <algorithm>
#include <limits>
#include <set>

namespace edgeattn
{
namespace
{

constexpr int64_t kLargestImage = std::numeric_limits<int32_t>::max();
constexpr std::array<int64_t, 3> kLargestGrid{std::numeric_limits<int32_t>::max(), 65535, 65535};
constexpr size_t kAlignment = 256;

constexpr std::array<char const*, kElementCount> kElementNames{"float16", "bfloat16", "float32"};
constexpr std::array<char const*, kLayoutCount> kLayoutNames{"linear", "channels-last"};

std::string joined(std::vector<std::string> const& parts, char const* separator)
{
    std::string text;
    for (size_t index = 0; index < parts.size(); ++index)
    {
        text += (index == 0 ? "" : separator) + parts[index];
    }
    return text;
}

std::string textOf(Shape const& shape)
{
    std::vector<std::string> extents;
    for (int64_t const extent : shape)
    {
        extents.push_back(std::to_string(extent));
    }
    return "(" + joined(extents, ", ") + ")";
}

//! Return the position of a name; throw Error when it is none of the names.
template <size_t count>
int32_t positionOf(std::string const& name, char const* subject, std::array<char const*, count> const& names)
{
    auto const found = std::find(names.begin(), names.end(), name);
    if (found == names.end())
    {
        throw Error(std::string(subject) + " '" + name + "' is none of "
            + joined(std::vector<std::string>(names.begin(), names.end()), ", "));
    }
    return static_cast<int32_t>(found - names.begin());
}

//! Return "head_channels=64, channels=512", with a question mark for what is unknown.
std::string staticText(Signature const& signature, Sizes const& sizes, char const* separator)
{
    std::vector<std::string> parts;
    for (int32_t const symbol : signature.staticSymbols)
    {
        int64_t const size = sizes[static_cast<size_t>(symbol)];
        parts.push_back(std::string(signature.symbols[static_cast<size_t>(symbol)]) + "="
            + (size == kUnknown ? "?" : std::to_string(size)));
    }
    return joined(parts, separator);
}

//! Return sizes that hold nothing but the static sizes of a row.
Sizes staticSizesOf(Signature const& signature, Row const& row)
{
    Sizes sizes(static_cast<size_t>(signature.symbols.size), kUnknown);
    for (int32_t index = 0; index < signature.staticSymbols.size; ++index)
    {
        auto const position = static_cast<size_t>(index);
        sizes[static_cast<size_t>(signature.staticSymbols[position])] = row.staticSizes[position];
    }
    return sizes;
}

} // namespace

Operation const& operationNamed(Table const& table, std::string const& name)
{
    std::vector<std::string> known;
    for (Operation const& operation : table.operations)
    {
        if (name == operation.opType)
        {
            return operation;
        }
        known.push_back(operation.opType);
    }
    throw Error("no such operation. This library holds: " + joined(known, ", "));
}

std::string contentsOf(Table const& table)
{
    std::string text;
    for (Operation const& operation : table.operations)
    {
        for (Signature const& signature : operation.signatures)
        {
            for (Row const& row : signature.rows)
            {
                text += std::string(operation.opType) + ", " + std::to_string(signature.inputs.size) + ", "
                    + describe(signature, row) + ", sm_" + std::to_string(row.sm) + "\n";
            }
        }
    }
    return text;
}

Element elementNamed(std::string const& name)
{
    return static_cast<Element>(positionOf(name, "the data type", kElementNames));
}

Layout layoutNamed(std::string const& name)
{
    return static_cast<Layout>(positionOf(name, "the layout", kLayoutNames));
}

Signature const& signatureOf(Operation const& operation, int32_t inputCount)
{
    std::vector<std::string> known;
    for (Signature const& signature : operation.signatures)
    {
        if (signature.inputs.size == inputCount)
        {
            return signature;
        }
        known.push_back(std::to_string(signature.inputs.size));
    }
    throw Error("it has " + std::to_string(inputCount) + " inputs, but takes " + joined(known, " or "));
}

Sizes sizesOf(Signature const& signature, std::vector<Shape> const& inputs)
{
    Sizes sizes(static_cast<size_t>(signature.symbols.size), kUnknown);
    for (size_t index = 0; index < inputs.size(); ++index)
    {
        Tensor const& tensor = signature.inputs[index];
        Shape const& shape = inputs[index];
        std::string const where = std::string(tensor.name) + " has shape " + textOf(shape);
        if (shape.size != tensor.axes.size)
        {
            throw Error(where + ", but needs " + std::to_string(tensor.axes.size) + " axes");
        }
        for (int32_t position = 0; position < shape.size; ++position)
        {
            auto const axis = static_cast<size_t>(position);
            if (shape[axis] <= 0)
            {
                throw Error(where + "; every axis needs a positive size");
            }
            if (tensor.axes[axis] == kAxisOfOne)
            {
                if (shape[axis] != 1)
                {
                    throw Error(where + ", but axis " + std::to_string(axis) + " must be 1");
                }
                continue;
            }
            int64_t& size = sizes[static_cast<size_t>(tensor.axes[axis])];
            if (size != kUnknown && size != shape[axis])
            {
                throw Error(where + ", but " + signature.symbols[static_cast<size_t>(tensor.axes[axis])] + " is "
                    + std::to_string(size) + " in an earlier input");
            }
            size = shape[axis];
        }
    }
    return sizes;
}

void checkImages(Signature const& signature, Sizes const& sizes)
{
    for (auto const& tensors : {signature.inputs, signature.outputs})
    {
        for (Tensor const& tensor : tensors)
        {
            int64_t elements = 1;
            for (int32_t axis = 1; axis < tensor.axes.size; ++axis)
            {
                int32_t const symbol = tensor.axes[static_cast<size_t>(axis)];
                int64_t const size = symbol == kAxisOfOne ? 1 : sizes[static_cast<size_t>(symbol)];
                if (__builtin_mul_overflow(elements, size, &elements) || elements > kLargestImage)
                {
                    throw Error(std::string("one image of ") + tensor.name + " has more than 2^31 - 1 elements at "
                        + describe(signature, sizes));
                }
            }
        }
    }
}

bool hasStaticSizes(Signature const& signature, Row const& row, Sizes const& sizes)
{
    return std::equal(signature.staticSymbols.begin(), signature.staticSymbols.end(), row.staticSizes.begin(),
        [&](int32_t symbol, int64_t size) { return sizes[static_cast<size_t>(symbol)] == size; });
}

std::vector<Row const*> rowsFor(Signature const& signature, Element element, Layout layout, Sizes const& sizes)
{
    std::vector<Row const*> rows;
    for (Row const& row : signature.rows)
    {
        if (row.element == element && row.layout == layout && hasStaticSizes(signature, row, sizes))
        {
            rows.push_back(&row);
        }
    }
    return rows;
}

std::string describe(Signature const& signature, Element element, Layout layout, Sizes const& sizes)
{
    std::string const fixed = staticText(signature, sizes, ", ");
    return std::string(kElementNames[static_cast<size_t>(element)]) + ", " + kLayoutNames[static_cast<size_t>(layout)]
        + (fixed.empty() ? "" : ", " + fixed);
}

std::string describe(Signature const& signature, Row const& row)
{
    return describe(signature, row.element, row.layout, staticSizesOf(signature, row));
}

std::string describe(Signature const& signature, Sizes const& sizes)
{
    std::vector<std::string> parts;
    for (size_t symbol = 0; symbol < sizes.size(); ++symbol)
    {
        if (sizes[symbol] != kUnknown)
        {
            parts.push_back(std::string(signature.symbols[symbol]) + "=" + std::to_string(sizes[symbol]));
        }
    }
    return joined(parts, ", ");
}

std::string missingKernel(
    Operation const& operation, Signature const& signature, Element element, Layout layout, Sizes const& sizes)
{
    std::set<std::string> known;
    for (Row const& row : signature.rows)
    {
        known.insert(describe(signature, row));
    }
    std::string text = "no kernel for " + describe(signature, element, layout, sizes) + ". This library holds:";
    for (std::string const& entry : known)
    {
        text += " (" + entry + ")";
    }
    text += known.empty() ? " none for this number of inputs." : ".";
    for (int32_t const symbol : signature.staticSymbols)
    {
        if (sizes[static_cast<size_t>(symbol)] == kUnknown)
        {
            return text + " Fix " + signature.symbols[static_cast<size_t>(symbol)]
                + " in the model: it is compiled into the kernels and cannot be dynamic";
        }
    }
    std::string const fixed = staticText(signature, sizes, ",");
    return text + " Compile it with `edgeattn plugins build --operation " + operation.opType
        + (fixed.empty() ? "" : " --size " + fixed) + "` and build this library again";
}

WorkspaceLayout workspaceOf(Row const& row, Sizes const& sizes)
{
    WorkspaceLayout layout{{}, 0};
    for (Expression const& bytes : row.workspaceBytes)
    {
        layout.offsets.push_back(layout.bytes);
        auto const size = static_cast<size_t>(evaluate(bytes, sizes));
        layout.bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    }
    return layout;
}

size_t largestWorkspace(std::vector<Row const*> const& rows, Sizes const& sizes)
{
    size_t bytes = 0;
    for (Row const* row : rows)
    {
        bytes = std::max(bytes, workspaceOf(*row, sizes).bytes);
    }
    return bytes;
}

std::vector<PlannedLaunch> planOf(Signature const& signature, Row const& row, Sizes const& sizes)
{
    std::vector<PlannedLaunch> plan;
    for (int32_t index = 0; index < row.kernels.size; ++index)
    {
        auto const position = static_cast<size_t>(index);
        Kernel const& kernel = row.kernels[position];
        std::string const where
            = std::string("launch ") + signature.launches[position].name + " at " + describe(signature, sizes);
        PlannedLaunch launch{};
        for (size_t axis = 0; axis < launch.grid.size(); ++axis)
        {
            int64_t const programs = evaluate(kernel.grid[axis], sizes);
            if (programs < 1 || programs > kLargestGrid[axis])
            {
                throw Error(where + " needs " + std::to_string(programs) + " programs along axis "
                    + std::string(1, "xyz"[axis]) + " of the grid; CUDA takes 1 to "
                    + std::to_string(kLargestGrid[axis]));
            }
            launch.grid[axis] = static_cast<uint32_t>(programs);
        }
        for (Expression const& scalar : kernel.scalars)
        {
            int64_t const value = evaluate(scalar, sizes);
            if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
            {
                throw Error(where + " has the argument " + std::to_string(value) + ", which leaves 32 bits");
            }
            launch.scalars.push_back(static_cast<int32_t>(value));
        }
        plan.push_back(std::move(launch));
    }
    return plan;
}

} // namespace edgeattn
