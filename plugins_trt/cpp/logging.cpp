#include "logging.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace edgeattn
{
namespace
{

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

//! Return the major version of the TensorRT that an object comes from, or ours where that cannot be told.
int32_t majorVersionBehind(void const* object)
{
    Dl_info owner{};
    void const* const virtualTable = *static_cast<void const* const*>(object);
    void* library = nullptr;
    if (dladdr(virtualTable, &owner) != 0 && owner.dli_fname != nullptr)
    {
        library = dlopen(owner.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    }
    void* const symbol = dlsym(library == nullptr ? RTLD_DEFAULT : library, "getInferLibVersion");
    int32_t const major
        = symbol == nullptr ? NV_TENSORRT_MAJOR : reinterpret_cast<int32_t (*)() noexcept>(symbol)() / 10000;
    if (library != nullptr)
    {
        dlclose(library);
    }
    return major;
}

} // namespace

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    // ILogger and ILoggerFinder have other virtual functions in TensorRT 11 than in 10: a call across that border would
    // run another function than the one it names.
    if (finder != nullptr && majorVersionBehind(finder) != NV_TENSORRT_MAJOR)
    {
        std::fprintf(stderr,
            "edgeattn: this plugin library was compiled for TensorRT %d and runs in TensorRT %d; its messages go to "
            "standard error. Compile it against the headers of the TensorRT that loads it.\n",
            static_cast<int>(NV_TENSORRT_MAJOR), static_cast<int>(majorVersionBehind(finder)));
        return;
    }
    loggerFinder.store(finder);
}

void log(Severity severity, std::string const& message) noexcept
{
    try
    {
        std::string const text = "edgeattn: " + message;
        nvinfer1::ILoggerFinder* const finder = loggerFinder.load();
        nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger != nullptr)
        {
            logger->log(severity, text.c_str());
        }
        else if (severity <= Severity::kWARNING)
        {
            std::fprintf(stderr, "%s\n", text.c_str());
        }
    }
    catch (std::exception const&) // no memory for the text, or a finder that throws
    {
    }
}

} // namespace edgeattn
