#include "cuda_driver.h"

#include "expression.h"

#include <dlfcn.h>

#include <cstdint>

namespace edgeattn
{
namespace
{

constexpr char const* kLibrary = "libcuda.so.1";

template <typename Function>
Function symbolOf(void* library, char const* name)
{
    return reinterpret_cast<Function>(dlsym(library, name));
}

template <typename Function>
Function requiredSymbolOf(void* library, char const* name)
{
    auto const function = symbolOf<Function>(library, name);
    if (function == nullptr)
    {
        throw Error(std::string(kLibrary) + " lacks " + name + "; the NVIDIA driver is too old");
    }
    return function;
}

CudaDriver load()
{
    // Never closed: kernels may still be in flight when static objects are destroyed.
    void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        char const* const reason = dlerror();
        throw Error(std::string("no NVIDIA driver: ") + (reason == nullptr ? kLibrary : reason));
    }
    CudaDriver driver{};
// cuda.h renames some functions ("cuCtxPopCurrent_v2"); the second macro sees the new name.
#define EDGEATTN_NAME(function) #function
#define EDGEATTN_FIND(function)                                                                                        \
    driver.function##_ = requiredSymbolOf<decltype(driver.function##_)>(library, EDGEATTN_NAME(function));
    EDGEATTN_DRIVER_FUNCTIONS(EDGEATTN_FIND)
#undef EDGEATTN_FIND
#undef EDGEATTN_NAME
    driver.contextId = symbolOf<decltype(driver.contextId)>(library, "cuCtxGetId");
    driver.check(driver.cuInit_(0), "initialising the CUDA driver");
    return driver;
}

} // namespace

CudaDriver const& CudaDriver::get()
{
    static CudaDriver const driver = load();
    return driver;
}

std::string CudaDriver::describe(CUresult result) const
{
    char const* name = nullptr;
    char const* text = nullptr;
    cuGetErrorName_(result, &name);
    cuGetErrorString_(result, &text);
    return (name == nullptr ? "CUDA error " + std::to_string(result) : std::string(name))
        + (text == nullptr ? "" : std::string(" (") + text + ")");
}

void CudaDriver::check(CUresult result, std::string const& action) const
{
    if (result != CUDA_SUCCESS)
    {
        throw Error(action + " failed: " + describe(result));
    }
}

ContextScope::ContextScope(CUstream stream)
{
    CudaDriver const& driver = CudaDriver::get();
    CUcontext context = nullptr;
    driver.check(driver.cuCtxGetCurrent_(&context), "asking for the current CUDA context");
    if (context == nullptr)
    {
        driver.check(driver.cuStreamGetCtx_(stream, &context), "asking for the CUDA context of the stream");
        driver.check(driver.cuCtxPushCurrent_(context), "making the CUDA context of the stream current");
        pushed_ = true;
    }
    // The address of a destroyed context may be used again; its id is not.
    if (driver.contextId == nullptr || driver.contextId(context, &id_) != CUDA_SUCCESS)
    {
        id_ = reinterpret_cast<uintptr_t>(context);
    }
}

ContextScope::~ContextScope()
{
    if (pushed_)
    {
        CUcontext context = nullptr;
        CudaDriver::get().cuCtxPopCurrent_(&context);
    }
}

bool threadHasContext()
{
    CudaDriver const& driver = CudaDriver::get();
    CUcontext context = nullptr;
    driver.check(driver.cuCtxGetCurrent_(&context), "asking for the current CUDA context");
    return context != nullptr;
}

} // namespace edgeattn
