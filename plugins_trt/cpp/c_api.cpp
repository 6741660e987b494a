#include "c_api.h"
#include "launcher.h"

namespace edgeattn
{
namespace
{

struct Texts
{
    std::string error;
    std::string remark;
    std::string contents;
};

thread_local Texts texts;

//! Run a function; when it throws, keep the reason and return 1.
template <typename Function>
int32_t attempt(char const* subject, Function&& function) noexcept
{
    try
    {
        texts = {};
        function();
        return 0;
    }
    catch (std::exception const& error)
    {
        try
        {
            texts.error = std::string(subject == nullptr ? "null" : subject) + ": " + error.what();
        }
        catch (std::exception const&) // no memory for the message
        {
        }
    }
    return 1;
}

Request requestOf(char const* opType, char const* element, char const* layout, int32_t inputCount, int32_t const* ranks,
    int64_t const* dims)
{
    if (opType == nullptr || element == nullptr || layout == nullptr || ranks == nullptr || dims == nullptr)
    {
        throw Error("a name, the ranks or the dimensions are null");
    }
    Operation const& operation = operationNamed(kTable, opType);
    Signature const& signature = signatureOf(operation, inputCount);
    std::vector<Shape> shapes;
    for (int32_t index = 0; index < inputCount; ++index)
    {
        shapes.push_back({dims, ranks[index] < 0 ? 0 : ranks[index]});
        dims += shapes.back().size;
    }
    return requestFor(operation, signature, sizesOf(signature, shapes), elementNamed(element), layoutNamed(layout));
}

template <typename Pointer>
void checkPointers(Span<Tensor> const& tensors, Pointer const* pointers)
{
    for (int32_t index = 0; index < tensors.size; ++index)
    {
        if (pointers == nullptr || pointers[index] == nullptr)
        {
            throw Error(std::string("the address of ") + tensors[static_cast<size_t>(index)].name + " is null");
        }
    }
}

} // namespace
} // namespace edgeattn

using namespace edgeattn;

int32_t edgeattn_workspace_bytes(char const* op_type, char const* element, char const* layout, int32_t input_count,
    int32_t const* ranks, int64_t const* dims, size_t* bytes)
{
    return attempt(op_type, [&] {
        Request const request = requestOf(op_type, element, layout, input_count, ranks, dims);
        *bytes = largestWorkspace(request.rows, request.sizes);
    });
}

int32_t edgeattn_launch(char const* op_type, char const* element, char const* layout, int32_t input_count,
    int32_t const* ranks, int64_t const* dims, void const* const* inputs, void* const* outputs, void* workspace,
    void* stream)
{
    return attempt(op_type, [&] {
        Request const request = requestOf(op_type, element, layout, input_count, ranks, dims);
        checkPointers(request.signature->inputs, inputs);
        checkPointers(request.signature->outputs, outputs);
        auto const cudaStream = static_cast<CUstream>(stream);
        ContextScope const context(cudaStream);
        Prepared const prepared = prepare(request, context.id());
        if (workspace == nullptr && prepared.workspace.bytes > 0)
        {
            throw Error("the address of the workspace is null");
        }
        texts.remark = prepared.code.remark;
        launchAll(request, prepared, inputs, outputs, workspace, cudaStream);
    });
}

char const* edgeattn_last_error()
{
    return texts.error.c_str();
}

char const* edgeattn_last_remark()
{
    return texts.remark.c_str();
}

char const* edgeattn_contents()
{
    bool const failed = attempt("edgeattn_contents", [] { texts.contents = contentsOf(kTable); }) != 0;
    return failed ? nullptr : texts.contents.c_str();
}
