#include "kernel_loader.h"

#include "expression.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>

namespace edgeattn
{
namespace
{

//! Dynamic shared memory that a kernel may have without asking.
constexpr uint32_t kSharedBytesWithoutOptIn = 48 * 1024;

struct Candidate
{
    Row const* row;
    bool isPtx;

    std::string name() const
    {
        std::string const architecture = "sm_" + std::to_string(row->sm);
        return isPtx ? "PTX " + std::to_string(row->ptxIsa / 10) + "." + std::to_string(row->ptxIsa % 10) + " for "
                + architecture
                     : "machine code for " + architecture;
    }
};

//! Return what may run on an architecture, best first.
std::vector<Candidate> candidatesFor(std::vector<Row const*> rows, int32_t sm)
{
    std::stable_sort(rows.begin(), rows.end(), [](Row const* left, Row const* right) { return left->sm > right->sm; });
    std::vector<Candidate> candidates;
    for (bool const isPtx : {false, true})
    {
        for (Row const* row : rows)
        {
            if (row->sm == sm || (isPtx && row->ptxIsPortable && row->sm < sm))
            {
                candidates.push_back({row, isPtx});
            }
        }
    }
    return candidates;
}

int32_t currentArchitecture(CudaDriver const& driver)
{
    CUdevice device = 0;
    int major = 0;
    int minor = 0;
    driver.check(driver.cuCtxGetDevice_(&device), "asking for the device of the CUDA context");
    driver.check(driver.cuDeviceGetAttribute_(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
        "asking for the compute capability");
    driver.check(driver.cuDeviceGetAttribute_(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
        "asking for the compute capability");
    return 10 * major + minor;
}

//! Functions by context, code and symbol. Kernels of several rows may share code.
class FunctionCache
{
public:
    CUfunction find(CudaDriver const& driver, unsigned long long contextId, unsigned char const* code,
        Kernel const& kernel)
    {
        std::lock_guard<std::mutex> const lock(mutex_);
        auto const key = std::make_tuple(contextId, code, std::string(kernel.entry));
        auto const known = functions_.find(key);
        if (known != functions_.end())
        {
            return known->second;
        }
        CUmodule const module = moduleOf(driver, contextId, code);
        CUfunction function = nullptr;
        driver.check(driver.cuModuleGetFunction_(&function, module, kernel.entry),
            std::string("looking up the kernel ") + kernel.entry);
        if (kernel.sharedBytes > kSharedBytesWithoutOptIn)
        {
            driver.check(driver.cuFuncSetAttribute_(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                             static_cast<int>(kernel.sharedBytes)),
                "reserving " + std::to_string(kernel.sharedBytes) + " bytes of shared memory for the kernel "
                    + kernel.entry);
        }
        functions_.emplace(key, function);
        return function;
    }

private:
    CUmodule moduleOf(CudaDriver const& driver, unsigned long long contextId, unsigned char const* code)
    {
        auto const known = modules_.find({contextId, code});
        if (known != modules_.end())
        {
            return known->second;
        }
        std::array<char, 1024> log{};
        std::array<CUjit_option, 2> options{CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        std::array<void*, 2> values{log.data(), reinterpret_cast<void*>(log.size() - 1)};
        CUmodule module = nullptr;
        CUresult const result = driver.cuModuleLoadDataEx_(
            &module, code, static_cast<unsigned int>(options.size()), options.data(), values.data());
        if (result != CUDA_SUCCESS)
        {
            throw Error(driver.describe(result) + (log[0] == '\0' ? "" : ": ") + log.data());
        }
        modules_.emplace(std::make_pair(contextId, code), module);
        return module;
    }

    std::mutex mutex_;
    std::map<std::pair<unsigned long long, unsigned char const*>, CUmodule> modules_;
    std::map<std::tuple<unsigned long long, unsigned char const*, std::string>, CUfunction> functions_;
};

FunctionCache& functionCache()
{
    // Never destroyed: the driver may be gone before this library is.
    static FunctionCache* const cache = new FunctionCache;
    return *cache;
}

} // namespace

LoadedRow loadRow(std::vector<Row const*> const& rows, unsigned long long contextId)
{
    CudaDriver const& driver = CudaDriver::get();
    int32_t const sm = currentArchitecture(driver);
    std::string refusals; // "", or " (the driver refuses ...; the driver refuses ...)" without the last bracket
    for (Candidate const& candidate : candidatesFor(rows, sm))
    {
        try
        {
            LoadedRow loaded{candidate.row, {}, {}};
            for (Kernel const& kernel : candidate.row->kernels)
            {
                unsigned char const* const code = candidate.isPtx ? kernel.ptx : kernel.cubin;
                loaded.functions.push_back(functionCache().find(driver, contextId, code, kernel));
            }
            if (candidate.isPtx)
            {
                loaded.remark = "this sm_" + std::to_string(sm) + " device runs " + candidate.name()
                    + ", which the driver compiles" + (refusals.empty() ? "" : refusals + ")");
            }
            return loaded;
        }
        catch (Error const& error)
        {
            refusals += refusals.empty() ? " (the driver refuses " : "; it refuses ";
            refusals += candidate.name() + ": " + error.what();
        }
    }
    std::string held;
    for (Row const* row : rows)
    {
        held += " sm_" + std::to_string(row->sm) + (row->ptxIsPortable ? "" : " (not for newer ones)");
    }
    throw Error("no kernel for this sm_" + std::to_string(sm) + " device" + (refusals.empty() ? "" : refusals + ")")
        + ". The library holds kernels for:" + held + ". Build one for this device with `edgeattn plugins build`");
}

} // namespace edgeattn
