// The kernel table: everything the host knows about operations. plugins_trt/cpp_table.py generates its content
// (kernel_table.cpp, kernels.S) from the PluginSpecs and a kernel library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgeattn
{

//! A constant array and its length.
template <typename T>
struct Span
{
    T const* data;
    int32_t size;

    T const* begin() const noexcept
    {
        return data;
    }
    T const* end() const noexcept
    {
        return data + size;
    }
    T const& operator[](size_t index) const noexcept
    {
        return data[index];
    }
};

//! One step of an expression in postfix order. Compile-time names are numbers already; what is left are sizes.
enum class Step : int32_t
{
    kNumber, //!< push `value`
    kSize,   //!< push the size of symbol `value`
    kAdd,
    kSubtract,
    kMultiply,
    kFloorDivide,
    kCeilDivide,
    kMaximum,
    kMinimum,
};

struct Token
{
    Step step;
    int64_t value;
};

using Expression = Span<Token>;

enum class Element : int32_t
{
    kFloat16,
    kBfloat16,
    kFloat32,
};
constexpr int32_t kElementCount = 3;

//! Layout of 4-D tensors; all others are linear.
enum class Layout : int32_t
{
    kLinear,
    kChannelsLast,
};
constexpr int32_t kLayoutCount = 2;

//! Axis of a tensor that always has size 1.
constexpr int32_t kAxisOfOne = -1;

struct Tensor
{
    char const* name;
    Span<int32_t> axes; //!< index of the symbol of every axis, or kAxisOfOne

    //! Whether the tensor may come channels-last.
    bool isMap() const noexcept
    {
        return axes.size == 4;
    }
};

enum class Source : int32_t
{
    kInput,
    kOutput,
    kWorkspace,
    kScalar,
};

//! What a kernel parameter receives: the `index`-th input, output, workspace or scalar.
struct Argument
{
    Source source;
    int32_t index;
};

struct Launch
{
    char const* name;
    Span<Argument> arguments; //!< in the order of the kernel's parameters
};

//! One launch of an operation, compiled.
struct Kernel
{
    char const* entry; //!< symbol in cubin and PTX
    Expression grid[3];
    Span<Expression> scalars;
    uint32_t threads;           //!< per block
    uint32_t sharedBytes;       //!< dynamic shared memory
    unsigned char const* cubin; //!< machine code for the row's architecture
    unsigned char const* ptx;   //!< zero-terminated
};

//! The kernels of all launches, compiled for one data type, layout, architecture and set of static sizes.
struct Row
{
    Element element;
    Layout layout;
    int32_t sm;
    int32_t ptxIsa;                  //!< such as 85 for 8.5
    bool ptxIsPortable;              //!< whether the PTX may run on newer architectures than `sm` ("sm_90a" may not)
    Span<int64_t> staticSizes;       //!< in the order of Signature::staticSymbols
    Span<Expression> workspaceBytes; //!< in the order of Signature::workspaces
    Span<Kernel> kernels;            //!< in the order of Signature::launches
};

//! An operation with one set of inputs.
struct Signature
{
    char const* name;
    Span<char const*> symbols;   //!< names of the sizes
    Span<int32_t> staticSymbols; //!< sizes that are compiled into the kernels
    Span<Tensor> inputs;
    Span<Tensor> outputs;
    Span<char const*> workspaces;
    Span<Launch> launches;
    Span<Row> rows;
};

//! What one plugin creator makes. Signatures differ in the number of inputs and agree in the number of outputs.
struct Operation
{
    char const* opType;
    Span<Signature> signatures;
};

struct Table
{
    char const* hash; //!< SHA-256 over the table and all code, in hexadecimal
    char const* pluginNamespace;
    char const* pluginVersion;
    Span<Operation> operations;
};

extern Table const kTable;

} // namespace edgeattn
