// Stands in for the CUDA driver, libcuda.so.1: loads "code" that tests write as text, and records every call that
// matters as one JSON line in the file FAKE_CUDA_LOG.
//
// Code is "cubin sm_87\n<entry>:<parameters>\n", or PTX with `.version`, `.target` and a comment
// "// <entry>:<parameters>", where <parameters> has a letter for each parameter: p for a pointer, i for an int32.
// FAKE_CUDA_SM is the device's architecture, FAKE_CUDA_ISA the newest PTX ISA, FAKE_CUDA_CONTEXT the thread's context.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <regex>
#include <sstream>
#include <string>

#undef cuCtxPushCurrent
#undef cuCtxPopCurrent

namespace
{

struct Module
{
    std::string text;
    uintptr_t context;
};

struct Function
{
    std::string entry;
    std::string parameters;
    uintptr_t context;
};

int setting(char const* name, int fallback)
{
    char const* const text = std::getenv(name);
    return text == nullptr ? fallback : std::atoi(text);
}

uintptr_t& current()
{
    static uintptr_t context = static_cast<uintptr_t>(setting("FAKE_CUDA_CONTEXT", 1));
    return context;
}

void record(std::string const& line)
{
    std::ofstream(std::getenv("FAKE_CUDA_LOG"), std::ios::app) << line << "\n";
}

//! The digits of all groups of the first match, as one number; -1 without a match.
int numberIn(std::string const& text, std::string const& pattern)
{
    std::smatch match;
    if (!std::regex_search(text, match, std::regex(pattern)))
    {
        return -1;
    }
    std::string digits;
    for (size_t group = 1; group < match.size(); ++group)
    {
        digits += match[group];
    }
    return std::stoi(digits);
}

} // namespace

extern "C"
{

CUresult cuInit(unsigned int)
{
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, char const** name)
{
    *name = error == CUDA_ERROR_UNSUPPORTED_PTX_VERSION ? "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" : "CUDA_ERROR_OTHER";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, char const** text)
{
    *text = "as the fake driver says";
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context)
{
    *context = reinterpret_cast<CUcontext>(current());
    return CUDA_SUCCESS;
}

CUresult cuCtxGetId(CUcontext context, unsigned long long* id)
{
    *id = 100 + reinterpret_cast<uintptr_t>(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context)
{
    record("{\"call\": \"push\", \"context\": " + std::to_string(reinterpret_cast<uintptr_t>(context)) + "}");
    current() = reinterpret_cast<uintptr_t>(context);
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext*)
{
    record("{\"call\": \"pop\"}");
    current() = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device)
{
    *device = 3;
    return current() == 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream, CUcontext* context)
{
    *context = reinterpret_cast<CUcontext>(uintptr_t{9});
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device)
{
    int const sm = setting("FAKE_CUDA_SM", 87);
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
    return device == 3 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuModuleLoadDataEx(
    CUmodule* module, void const* image, unsigned int count, CUjit_option* options, void** values)
{
    std::string const text = static_cast<char const*>(image);
    bool const isPtx = text.compare(0, 5, "cubin") != 0;
    int const sm = numberIn(text, isPtx ? "\\.target sm_(\\d+)" : "^cubin sm_(\\d+)");
    int const isa = isPtx ? numberIn(text, "\\.version (\\d+)\\.(\\d)") : 0;
    CUresult result = CUDA_SUCCESS;
    if (!isPtx && (sm != setting("FAKE_CUDA_SM", 87) || std::getenv("FAKE_CUDA_REFUSES_CUBINS") != nullptr))
    {
        result = CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    else if (isPtx && isa > setting("FAKE_CUDA_ISA", 85))
    {
        result = CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
        char* log = nullptr;
        size_t size = 0;
        for (unsigned int index = 0; index < count; ++index)
        {
            if (options[index] == CU_JIT_ERROR_LOG_BUFFER)
            {
                log = static_cast<char*>(values[index]);
            }
            if (options[index] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
            {
                size = reinterpret_cast<size_t>(values[index]);
            }
        }
        std::snprintf(log, size, "ptxas said no");
    }
    record("{\"call\": \"load\", \"kind\": \"" + std::string(isPtx ? "ptx" : "cubin")
        + "\", \"sm\": " + std::to_string(sm) + ", \"context\": " + std::to_string(current())
        + ", \"result\": " + std::to_string(result) + "}");
    *module = reinterpret_cast<CUmodule>(new Module{text, current()});
    return result;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule handle, char const* name)
{
    auto const* const module = reinterpret_cast<Module const*>(handle);
    std::smatch match;
    if (module->context != current()
        || !std::regex_search(module->text, match, std::regex("\\b" + std::string(name) + ":([pi]+)\\b")))
    {
        return CUDA_ERROR_NOT_FOUND;
    }
    *function = reinterpret_cast<CUfunction>(new Function{name, match[1], current()});
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value)
{
    record("{\"call\": \"attribute\", \"entry\": \"" + reinterpret_cast<Function const*>(handle)->entry
        + "\", \"attribute\": " + std::to_string(attribute) + ", \"value\": " + std::to_string(value) + "}");
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction handle, unsigned int gridX, unsigned int gridY, unsigned int gridZ,
    unsigned int blockX, unsigned int blockY, unsigned int blockZ, unsigned int shared, CUstream stream,
    void** parameters, void** extra)
{
    auto const& function = *reinterpret_cast<Function const*>(handle);
    if (function.context != current() || extra != nullptr)
    {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    std::ostringstream line;
    line << "{\"call\": \"launch\", \"entry\": \"" << function.entry << "\", "
         << "\"grid\": [" << gridX << ", " << gridY << ", " << gridZ << "], "
         << "\"block\": [" << blockX << ", " << blockY << ", " << blockZ << "], \"shared\": " << shared
         << ", \"stream\": " << reinterpret_cast<uintptr_t>(stream) << ", \"arguments\": [";
    for (size_t index = 0; index < function.parameters.size(); ++index)
    {
        int64_t value = 0;
        std::memcpy(&value, parameters[index], function.parameters[index] == 'p' ? 8 : 4);
        line << (index == 0 ? "" : ", ") << value;
    }
    line << "]}";
    record(line.str());
    return std::getenv("FAKE_CUDA_REFUSES_LAUNCHES") == nullptr ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
}

void fakeSetContext(int context)
{
    current() = static_cast<uintptr_t>(context);
}

} // extern "C"
