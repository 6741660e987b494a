// From shapes to launches: sizes, rows of the table that fit, grids, scalars and the workspace. Knows neither
// TensorRT nor CUDA.
#pragma once

#include "expression.h"
#include "kernel_table.h"

#include <array>
#include <string>
#include <vector>

namespace edgeattn
{

//! Dimensions of a tensor; -1 where unknown.
using Shape = Span<int64_t>;

constexpr int64_t kUnknown = -1;

//! Return the operation with a name; throw Error when the table has none.
Operation const& operationNamed(Table const& table, std::string const& name);

//! Return one line for every row, such as "CrissCrossAttention, 3, float16, linear, head_channels=64, channels=512,
//! sm_87", where 3 is the number of inputs.
std::string contentsOf(Table const& table);

//! Return the element or layout with a name such as "float16" or "channels-last"; throw Error when there is none.
Element elementNamed(std::string const& name);
Layout layoutNamed(std::string const& name);

//! Return the signature with that many inputs; throw Error when there is none.
Signature const& signatureOf(Operation const& operation, int32_t inputCount);

//! Return the sizes of all symbols from the shapes of inputs; throw Error unless all fit together and are positive.
Sizes sizesOf(Signature const& signature, std::vector<Shape> const& inputs);

//! Throw Error when one image of a tensor has more elements than kernels can index.
void checkImages(Signature const& signature, Sizes const& sizes);

//! Whether a row was compiled for the static sizes among `sizes`.
bool hasStaticSizes(Signature const& signature, Row const& row, Sizes const& sizes);

//! Return the rows for a data type, a layout and the static sizes among `sizes`.
std::vector<Row const*> rowsFor(Signature const& signature, Element element, Layout layout, Sizes const& sizes);

//! Return "float16, linear, head_channels=64, channels=512".
std::string describe(Signature const& signature, Element element, Layout layout, Sizes const& sizes);

//! Return the same for what a row was compiled for.
std::string describe(Signature const& signature, Row const& row);

//! Return "batch=1, height=97" for all sizes that are known.
std::string describe(Signature const& signature, Sizes const& sizes);

//! Return what to say when no row fits: what was asked for, what there is, and what to do.
std::string missingKernel(
    Operation const& operation, Signature const& signature, Element element, Layout layout, Sizes const& sizes);

//! Sub-buffers of the workspace, each aligned to 256 bytes.
struct WorkspaceLayout
{
    std::vector<size_t> offsets;
    size_t bytes;
};

WorkspaceLayout workspaceOf(Row const& row, Sizes const& sizes);

//! Return the bytes of the workspace that are enough whichever of the rows runs; 0 without rows.
size_t largestWorkspace(std::vector<Row const*> const& rows, Sizes const& sizes);

struct PlannedLaunch
{
    std::array<uint32_t, 3> grid;
    std::vector<int32_t> scalars;
};

//! Return grid and scalars of every launch; throw Error for a grid or a scalar that CUDA cannot take.
std::vector<PlannedLaunch> planOf(Signature const& signature, Row const& row, Sizes const& sizes);

} // namespace edgeattn
