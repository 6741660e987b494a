// Messages, and the border that no exception crosses.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace edgeattn
{

using Severity = nvinfer1::ILogger::Severity;

//! Where messages go from now on; standard error until then, or when the finder is of another TensorRT.
void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

//! Send a message to TensorRT's logger.
void log(Severity severity, std::string const& message) noexcept;

//! Run a function; when it throws, log why and return `failure`.
template <typename Result, typename Function>
Result guarded(char const* subject, Result failure, Function&& function) noexcept
{
    try
    {
        return function();
    }
    catch (std::exception const& error)
    {
        try
        {
            log(Severity::kERROR, std::string(subject) + ": " + error.what() + ".");
        }
        catch (std::exception const&) // no memory for the message
        {
        }
    }
    return failure;
}

} // namespace edgeattn
