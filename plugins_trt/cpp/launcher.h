// From a request to its launches: what TensorRT's enqueue and the C functions share. Knows nothing of TensorRT.
#pragma once

#include "kernel_loader.h"
#include "kernel_table.h"
#include "plan.h"

#include <vector>

namespace edgeattn
{

//! What shapes, data type and layout ask for.
struct Request
{
    Signature const* signature;
    Sizes sizes;
    std::vector<Row const*> rows; //!< one or more, for different architectures
};

//! Return the request; throw Error when its images are too large or no kernel fits.
Request requestFor(
    Operation const& operation, Signature const& signature, Sizes sizes, Element element, Layout layout);

//! A request with code loaded for one CUDA context, ready to launch.
struct Prepared
{
    unsigned long long contextId;
    LoadedRow code;
    std::vector<PlannedLaunch> launches;
    WorkspaceLayout workspace;
};

//! Load the code and plan the launches; throw Error with the reason. `contextId` is the id of the current context.
Prepared prepare(Request const& request, unsigned long long contextId);

//! Launch all kernels of an operation in order; throw Error when the driver refuses one.
void launchAll(Request const& request, Prepared const& prepared, void const* const* inputs, void* const* outputs,
    void* workspace, CUstream stream);

} // namespace edgeattn
