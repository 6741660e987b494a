// The two functions that TensorRT looks up in a plugin library. Nothing registers itself when the library loads, so it
// needs no symbol of TensorRT and loads without it.
#include "logging.h"
#include "plugin.h"

#include <deque>

namespace edgeattn
{
namespace
{

struct Creators
{
    std::deque<OperationCreator> owned;
    std::vector<nvinfer1::IPluginCreatorInterface*> pointers;

    Creators()
    {
        for (Operation const& operation : kTable.operations)
        {
            pointers.push_back(&owned.emplace_back(operation));
        }
    }
};

} // namespace
} // namespace edgeattn

#define EDGEATTN_EXPORT extern "C" __attribute__((visibility("default")))

EDGEATTN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept
{
    nbCreators = 0;
    nvinfer1::IPluginCreatorInterface* const* const none = nullptr;
    return edgeattn::guarded("getCreators", none, [&] {
        static edgeattn::Creators creators;
        nbCreators = static_cast<int32_t>(creators.pointers.size());
        nvinfer1::IPluginCreatorInterface* const* const pointers = creators.pointers.data();
        return pointers;
    });
}

EDGEATTN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    edgeattn::useLoggerFinder(finder);
}
