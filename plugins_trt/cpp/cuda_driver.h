// The CUDA driver, found at run time, so that the library loads on a machine without a GPU.
#pragma once

#include <cuda.h>

#include <string>

namespace edgeattn
{

// Every function of the driver that is called, under the name cuda.h gives it.
#define EDGEATTN_DRIVER_FUNCTIONS(APPLY)                                                                               \
    APPLY(cuInit)                                                                                                      \
    APPLY(cuGetErrorName)                                                                                              \
    APPLY(cuGetErrorString)                                                                                            \
    APPLY(cuCtxGetCurrent)                                                                                             \
    APPLY(cuCtxPushCurrent)                                                                                            \
    APPLY(cuCtxPopCurrent)                                                                                             \
    APPLY(cuCtxGetDevice)                                                                                              \
    APPLY(cuStreamGetCtx)                                                                                              \
    APPLY(cuDeviceGetAttribute)                                                                                        \
    APPLY(cuModuleLoadDataEx)                                                                                          \
    APPLY(cuModuleGetFunction)                                                                                         \
    APPLY(cuFuncSetAttribute)                                                                                          \
    APPLY(cuLaunchKernel)

struct CudaDriver
{
#define EDGEATTN_MEMBER(function) decltype(&::function) function##_;
    EDGEATTN_DRIVER_FUNCTIONS(EDGEATTN_MEMBER)
#undef EDGEATTN_MEMBER

    //! cuCtxGetId, which drivers older than CUDA 12 lack (null then).
    CUresult (*contextId)(CUcontext, unsigned long long*);

    //! Return the driver; throw Error when there is none.
    static CudaDriver const& get();

    //! Return "CUDA_ERROR_INVALID_VALUE (invalid argument)".
    std::string describe(CUresult result) const;

    //! Throw Error unless the call succeeded.
    void check(CUresult result, std::string const& action) const;
};

//! While it lives, a CUDA context is current: the thread's own, or else that of the stream.
class ContextScope
{
public:
    //! Throw Error when neither the thread nor the stream has a context.
    explicit ContextScope(CUstream stream);
    ~ContextScope();
    ContextScope(ContextScope const&) = delete;
    ContextScope& operator=(ContextScope const&) = delete;

    //! Identity of the context; no two contexts of a process share it where the driver can tell.
    unsigned long long id() const noexcept
    {
        return id_;
    }

private:
    unsigned long long id_{0};
    bool pushed_{false};
};

//! Whether the calling thread has a CUDA context; throw Error when there is no driver.
bool threadHasContext();

} // namespace edgeattn
