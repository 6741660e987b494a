#include "launcher.h"

namespace edgeattn
{
namespace
{

void launch(Request const& request, Prepared const& prepared, size_t position, void const* const* inputs,
    void* const* outputs, void* workspace, CUstream stream)
{
    Launch const& declared = request.signature->launches[position];
    Kernel const& kernel = prepared.code.row->kernels[position];
    PlannedLaunch const& planned = prepared.launches[position];
    auto const count = static_cast<size_t>(declared.arguments.size);
    std::vector<void const*> pointers(count, nullptr);
    std::vector<void*> parameters(count, nullptr);
    for (size_t number = 0; number < count; ++number)
    {
        Argument const& argument = declared.arguments[number];
        auto const source = static_cast<size_t>(argument.index);
        parameters[number] = &pointers[number];
        switch (argument.source)
        {
        case Source::kInput: pointers[number] = inputs[source]; break;
        case Source::kOutput: pointers[number] = outputs[source]; break;
        case Source::kWorkspace:
            pointers[number] = static_cast<unsigned char*>(workspace) + prepared.workspace.offsets[source];
            break;
        case Source::kScalar: // the driver only reads it
            parameters[number] = const_cast<int32_t*>(&planned.scalars[source]);
            break;
        }
    }
    CudaDriver const& driver = CudaDriver::get();
    CUresult const result = driver.cuLaunchKernel_(prepared.code.functions[position], planned.grid[0], planned.grid[1],
        planned.grid[2], kernel.threads, 1, 1, kernel.sharedBytes, stream, parameters.data(), nullptr);
    if (result != CUDA_SUCCESS)
    {
        driver.check(result,
            std::string("launching the kernel ") + kernel.entry + " (" + declared.name + ", grid "
                + std::to_string(planned.grid[0]) + "x" + std::to_string(planned.grid[1]) + "x"
                + std::to_string(planned.grid[2]) + ", " + std::to_string(kernel.threads) + " threads, "
                + std::to_string(kernel.sharedBytes) + " bytes of shared memory) at "
                + describe(*request.signature, request.sizes));
    }
}

} // namespace

Request requestFor(
    Operation const& operation, Signature const& signature, Sizes sizes, Element element, Layout layout)
{
    checkImages(signature, sizes);
    std::vector<Row const*> rows = rowsFor(signature, element, layout, sizes);
    if (rows.empty())
    {
        throw Error(missingKernel(operation, signature, element, layout, sizes));
    }
    return {&signature, std::move(sizes), std::move(rows)};
}

Prepared prepare(Request const& request, unsigned long long contextId)
{
    Prepared prepared{contextId, loadRow(request.rows, contextId), {}, {}};
    Row const& row = *prepared.code.row;
    prepared.launches = planOf(*request.signature, row, request.sizes);
    prepared.workspace = workspaceOf(row, request.sizes);
    return prepared;
}

void launchAll(Request const& request, Prepared const& prepared, void const* const* inputs, void* const* outputs,
    void* workspace, CUstream stream)
{
    for (int32_t index = 0; index < request.signature->launches.size; ++index)
    {
        launch(request, prepared, static_cast<size_t>(index), inputs, outputs, workspace, stream);
    }
}

} // namespace edgeattn
