// Plays TensorRT for a plugin library: loads it, and does what commands from standard input say. Every command gives
// one line of JSON with the result and the messages that the library logged meanwhile.
//
// A tensor is written type:format:dimensions, such as 1:0:2,64,97,97, by the numbers of TensorRT's enums. An axis of
// unknown size is -1; in `shapes` it is a name.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

// What the real library exports; the host asks which TensorRT it runs in.
extern "C" int32_t getInferLibVersion() noexcept
{
    char const* const version = std::getenv("FAKE_TENSORRT_VERSION");
    return version == nullptr ? static_cast<int32_t>(NV_TENSORRT_MAJOR * 10000) : std::atoi(version);
}

namespace
{

std::string quoted(std::string const& text)
{
    return "\"" + text + "\"";
}

template <typename Items>
std::string listed(Items const& items)
{
    std::ostringstream text;
    text << "[";
    for (size_t index = 0; index < items.size(); ++index)
    {
        text << (index == 0 ? "" : ", ") << items[index];
    }
    text << "]";
    return text.str();
}

class Logger : public ILogger
{
public:
    void log(Severity severity, AsciiChar const* text) noexcept override
    {
        messages.push_back("[" + std::to_string(static_cast<int32_t>(severity)) + ", " + quoted(text) + "]");
    }
    std::vector<std::string> messages;
};

Logger logger;

class LoggerFinder : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return &logger;
    }
};

//! An expression that is a number or a name.
class Expression : public IDimensionExpr, public apiv::VDimensionExpr
{
public:
    explicit Expression(std::string text)
        : text(std::move(text))
    {
        mImpl = this;
    }
    bool isConstant() const override
    {
        return text.find_first_not_of("0123456789") == std::string::npos;
    }
    int64_t getConstantValue() const override
    {
        return std::stoll(text);
    }
    bool isSizeTensor() const override
    {
        return false;
    }
    std::string text;
};

class ExpressionBuilder : public IExprBuilder, public apiv::VExprBuilder
{
public:
    ExpressionBuilder()
    {
        mImpl = this;
    }
    IDimensionExpr const* constant(int64_t value) override
    {
        return make(std::to_string(value));
    }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
    IDimensionExpr const* make(std::string const& text)
    {
        owned.push_back(std::make_unique<Expression>(text));
        return owned.back().get();
    }
    std::vector<std::unique_ptr<Expression>> owned;
};

std::vector<std::string> split(std::string const& text, char separator)
{
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, separator);)
    {
        parts.push_back(part);
    }
    return parts;
}

PluginTensorDesc descOf(std::string const& text)
{
    std::vector<std::string> const parts = split(text, ':');
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(std::stoi(parts.at(0)));
    desc.format = static_cast<TensorFormat>(std::stoi(parts.at(1)));
    for (std::string const& extent : split(parts.at(2), ','))
    {
        desc.dims.d[desc.dims.nbDims++] = std::stoll(extent);
    }
    return desc;
}

//! What the library must not read.
PluginTensorDesc poison()
{
    PluginTensorDesc desc{};
    desc.type = static_cast<DataType>(-77);
    desc.format = static_cast<TensorFormat>(-77);
    desc.dims.nbDims = 1000000;
    return desc;
}

using Arguments = std::vector<std::string>;

class Session
{
public:
    explicit Session(char const* path)
    {
        library_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr)
        {
            std::cerr << dlerror() << "\n";
            std::exit(3);
        }
        reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library_, "setLoggerFinder"))(&finder_);
        auto const getCreators
            = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library_, "getCreators"));
        int32_t count = 0;
        IPluginCreatorInterface* const* const creators = getCreators(count);
        for (int32_t index = 0; index < count; ++index)
        {
            creators_.push_back(static_cast<IPluginCreatorV3One*>(creators[index]));
        }
    }

    std::string run(std::string const& command, Arguments const& arguments)
    {
        return commands_.at(command)(arguments);
    }

private:
    template <typename Capability>
    Capability& as(PluginCapabilityType type)
    {
        return *static_cast<Capability*>(plugin_->getCapabilityInterface(type));
    }
    IPluginV3OneCore& core()
    {
        return as<IPluginV3OneCore>(PluginCapabilityType::kCORE);
    }
    IPluginV3OneBuild& build()
    {
        return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD);
    }
    IPluginV3OneRuntime& runtime()
    {
        return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
    }

    std::string creators(Arguments const&)
    {
        std::vector<std::string> lines;
        for (IPluginCreatorV3One* creator : creators_)
        {
            lines.push_back("{\"name\": " + quoted(creator->getPluginName()) + ", \"version\": "
                + quoted(creator->getPluginVersion()) + ", \"namespace\": " + quoted(creator->getPluginNamespace())
                + ", \"fields\": " + std::to_string(creator->getFieldNames()->nbFields) + ", \"interface\": "
                + quoted(creator->getInterfaceInfo().kind) + "}");
        }
        return listed(lines);
    }

    IPluginCreatorV3One* creatorOf(std::string const& name)
    {
        for (IPluginCreatorV3One* creator : creators_)
        {
            if (name == creator->getPluginName())
            {
                return creator;
            }
        }
        std::cerr << "no creator " << name << "\n";
        std::exit(3);
    }

    //! create NAME: for the build phase, with a field that the plugin does not know.
    std::string create(Arguments const& arguments)
    {
        int32_t const value = 7;
        PluginField const field("unknown", &value, PluginFieldType::kINT32, 1);
        PluginFieldCollection const fields{1, &field};
        plugin_.reset(creatorOf(arguments.at(0))->createPlugin("layer", &fields, TensorRTPhase::kBUILD));
        return plugin_ ? "true" : "false";
    }

    //! load NAME FIELD TEXT: for the runtime phase, with one text field.
    std::string load(Arguments const& arguments)
    {
        std::string const& text = arguments.at(2);
        PluginField const field(
            arguments.at(1).c_str(), text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size()));
        PluginFieldCollection const fields{1, &field};
        plugin_.reset(creatorOf(arguments.at(0))->createPlugin("layer", &fields, TensorRTPhase::kRUNTIME));
        return plugin_ ? "true" : "false";
    }

    //! serialise: as an engine does, with copies that end where the data ends.
    std::string serialise(Arguments const&)
    {
        PluginFieldCollection const& fields = *runtime().getFieldsToSerialize();
        std::vector<std::string> names;
        std::vector<std::vector<char>> data;
        std::vector<PluginField> copies;
        for (int32_t index = 0; index < fields.nbFields; ++index)
        {
            PluginField const& field = fields.fields[index];
            auto const* const first = static_cast<char const*>(field.data);
            names.emplace_back(field.name);
            data.emplace_back(first, first + field.length);
            copies.push_back(field);
        }
        for (size_t index = 0; index < copies.size(); ++index)
        {
            copies[index].name = names[index].c_str();
            copies[index].data = data[index].data();
        }
        PluginFieldCollection const copied{fields.nbFields, copies.data()};
        std::string const name = core().getPluginName();
        plugin_.reset(creatorOf(name)->createPlugin("layer", &copied, TensorRTPhase::kRUNTIME));
        return plugin_ ? quoted(std::string(data.at(0).begin(), data.at(0).end())) : "null";
    }

    std::string clone(Arguments const&)
    {
        plugin_.reset(plugin_->clone());
        return plugin_ ? "true" : "false";
    }

    std::string attach(Arguments const&)
    {
        plugin_.reset(runtime().attachToContext(nullptr));
        return plugin_ ? "true" : "false";
    }

    std::string describe(Arguments const&)
    {
        return "{\"name\": " + quoted(core().getPluginName()) + ", \"version\": " + quoted(core().getPluginVersion())
            + ", \"namespace\": " + quoted(core().getPluginNamespace())
            + ", \"outputs\": " + std::to_string(build().getNbOutputs())
            + ", \"timing\": " + quoted(build().getTimingCacheID())
            + ", \"limit\": " + std::to_string(build().getFormatCombinationLimit()) + ", \"kinds\": ["
            + quoted(plugin_->getInterfaceInfo().kind) + ", " + quoted(core().getInterfaceInfo().kind) + ", "
            + quoted(build().getInterfaceInfo().kind) + ", " + quoted(runtime().getInterfaceInfo().kind) + "]}";
    }

    //! types OUTPUTS TYPE...
    std::string types(Arguments const& arguments)
    {
        std::vector<DataType> inputs;
        for (size_t index = 1; index < arguments.size(); ++index)
        {
            inputs.push_back(static_cast<DataType>(std::stoi(arguments[index])));
        }
        std::vector<DataType> outputs(static_cast<size_t>(std::stoi(arguments.at(0))));
        int32_t const status = build().getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()),
            inputs.data(), static_cast<int32_t>(inputs.size()));
        std::vector<int32_t> numbers;
        for (DataType type : outputs)
        {
            numbers.push_back(static_cast<int32_t>(type));
        }
        return status == 0 ? listed(numbers) : "null";
    }

    //! shapes OUTPUTS AXIS,AXIS...: an axis is a name or a number.
    std::string shapes(Arguments const& arguments)
    {
        ExpressionBuilder builder;
        std::vector<DimsExprs> inputs;
        for (size_t index = 1; index < arguments.size(); ++index)
        {
            DimsExprs dims{};
            for (std::string const& axis : split(arguments[index], ','))
            {
                dims.d[dims.nbDims++] = builder.make(axis);
            }
            inputs.push_back(dims);
        }
        std::vector<DimsExprs> outputs(static_cast<size_t>(std::stoi(arguments.at(0))));
        int32_t const status = build().getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
            outputs.data(), static_cast<int32_t>(outputs.size()), builder);
        std::vector<std::string> lines;
        for (DimsExprs const& dims : outputs)
        {
            std::vector<std::string> axes;
            for (int32_t axis = 0; axis < dims.nbDims; ++axis)
            {
                axes.push_back(quoted(static_cast<Expression const*>(dims.d[axis])->text));
            }
            lines.push_back(listed(axes));
        }
        return status == 0 ? listed(lines) : "null";
    }

    //! formats INPUTS TENSOR...: all combinations of types and formats that the plugin accepts, as TensorRT looks for
    //! them. Types and formats of the tensors are ignored.
    std::string formats(Arguments const& arguments)
    {
        auto const inputs = std::stoi(arguments.at(0));
        std::vector<DynamicPluginTensorDesc> tensors;
        for (size_t index = 1; index < arguments.size(); ++index)
        {
            DynamicPluginTensorDesc tensor{};
            tensor.desc = descOf(arguments[index]);
            tensor.min = tensor.opt = tensor.max = tensor.desc.dims;
            tensors.push_back(tensor);
        }
        std::vector<std::string> found;
        std::vector<std::string> chosen;
        std::function<void(size_t)> const search = [&](size_t position) {
            if (position == tensors.size())
            {
                found.push_back(listed(chosen));
                return;
            }
            std::vector<DynamicPluginTensorDesc> visible = tensors;
            for (size_t index = position + 1; index < visible.size(); ++index)
            {
                visible[index] = {poison(), poison().dims, poison().dims, poison().dims};
            }
            for (int32_t type = 0; type < EnumMax<DataType>(); ++type)
            {
                for (int32_t format = 0; format < EnumMax<TensorFormat>(); ++format)
                {
                    visible[position].desc.type = static_cast<DataType>(type);
                    visible[position].desc.format = static_cast<TensorFormat>(format);
                    if (build().supportsFormatCombination(static_cast<int32_t>(position), visible.data(), inputs,
                            static_cast<int32_t>(tensors.size()) - inputs))
                    {
                        tensors[position].desc.type = visible[position].desc.type;
                        tensors[position].desc.format = visible[position].desc.format;
                        chosen.push_back("[" + std::to_string(type) + ", " + std::to_string(format) + "]");
                        search(position + 1);
                        chosen.pop_back();
                    }
                }
            }
        };
        search(0);
        return listed(found);
    }

    //! workspace INPUTS TENSOR...: dimensions are the largest; those of the network are unknown.
    std::string workspace(Arguments const& arguments)
    {
        auto const inputs = static_cast<size_t>(std::stoi(arguments.at(0)));
        std::vector<DynamicPluginTensorDesc> tensors;
        for (size_t index = 1; index < arguments.size(); ++index)
        {
            DynamicPluginTensorDesc tensor{};
            tensor.desc = descOf(arguments[index]);
            tensor.min = tensor.opt = tensor.max = tensor.desc.dims;
            tensors.push_back(tensor);
        }
        auto const outputs = static_cast<int32_t>(tensors.size() - inputs);
        auto const count = static_cast<int32_t>(inputs);
        if (build().configurePlugin(tensors.data(), count, tensors.data() + inputs, outputs) != 0)
        {
            return "null";
        }
        return std::to_string(build().getWorkspaceSize(tensors.data(), count, tensors.data() + inputs, outputs));
    }

    //! resize INPUTS TENSOR...: onShapeChange.
    std::string resize(Arguments const& arguments)
    {
        inputs_ = static_cast<size_t>(std::stoi(arguments.at(0)));
        tensors_.clear();
        for (size_t index = 1; index < arguments.size(); ++index)
        {
            tensors_.push_back(descOf(arguments[index]));
        }
        return std::to_string(runtime().onShapeChange(tensors_.data(), static_cast<int32_t>(inputs_),
            tensors_.data() + inputs_, static_cast<int32_t>(tensors_.size() - inputs_)));
    }

    //! enqueue WORKSPACE STREAM: input i is at 4096 * (i + 1), output i at 1048576 * (i + 1).
    std::string enqueue(Arguments const& arguments)
    {
        std::vector<void const*> inputs;
        std::vector<void*> outputs;
        for (size_t index = 0; index < tensors_.size(); ++index)
        {
            if (index < inputs_)
            {
                inputs.push_back(reinterpret_cast<void const*>(4096 * (index + 1)));
            }
            else
            {
                outputs.push_back(reinterpret_cast<void*>(1048576 * (index - inputs_ + 1)));
            }
        }
        auto const pointer = [&](size_t index) { return reinterpret_cast<void*>(std::stoull(arguments.at(index))); };
        return std::to_string(runtime().enqueue(tensors_.data(), tensors_.data() + inputs_, inputs.data(),
            outputs.data(), pointer(0), static_cast<cudaStream_t>(pointer(1))));
    }

    //! context NUMBER: makes a context of the fake driver current.
    std::string context(Arguments const& arguments)
    {
        void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
        reinterpret_cast<void (*)(int)>(dlsym(driver, "fakeSetContext"))(std::stoi(arguments.at(0)));
        return "true";
    }

    using Command = std::string (Session::*)(Arguments const&);
    std::function<std::string(Arguments const&)> bound(Command command)
    {
        return [this, command](Arguments const& arguments) { return (this->*command)(arguments); };
    }

    void* library_{nullptr};
    LoggerFinder finder_;
    std::vector<IPluginCreatorV3One*> creators_;
    std::unique_ptr<IPluginV3> plugin_;
    std::vector<PluginTensorDesc> tensors_;
    size_t inputs_{0};
    std::map<std::string, std::function<std::string(Arguments const&)>> commands_{
        {"creators", bound(&Session::creators)},
        {"create", bound(&Session::create)},
        {"load", bound(&Session::load)},
        {"serialise", bound(&Session::serialise)},
        {"clone", bound(&Session::clone)},
        {"attach", bound(&Session::attach)},
        {"describe", bound(&Session::describe)},
        {"types", bound(&Session::types)},
        {"shapes", bound(&Session::shapes)},
        {"formats", bound(&Session::formats)},
        {"workspace", bound(&Session::workspace)},
        {"resize", bound(&Session::resize)},
        {"enqueue", bound(&Session::enqueue)},
        {"context", bound(&Session::context)},
    };
};

} // namespace

int main(int, char** argv)
{
    Session session(argv[1]);
    for (std::string line; std::getline(std::cin, line);)
    {
        Arguments arguments = split(line, ' ');
        std::string const command = arguments.at(0);
        arguments.erase(arguments.begin());
        std::string const result = session.run(command, arguments);
        std::cout << "{\"result\": " << result << ", \"log\": " << listed(logger.messages) << "}\n";
        logger.messages.clear();
    }
    std::cout.flush();
}
