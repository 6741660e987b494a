// Prints what a generated kernel table holds as JSON: for every signature, the rows with their expressions evaluated.
//
// Reads the size of every symbol from standard input, as "symbol size" lines. Knows neither TensorRT nor CUDA.
#include "plan.h"

#include <cstring>
#include <iostream>
#include <map>

using namespace edgeattn;

namespace
{

std::string quoted(std::string const& text)
{
    return "\"" + text + "\"";
}

template <typename Items, typename Print>
void list(Items const& items, Print&& print)
{
    std::cout << "[";
    bool first = true;
    for (auto const& item : items)
    {
        std::cout << (first ? "" : ", ");
        first = false;
        print(item);
    }
    std::cout << "]";
}

//! The first line of embedded code, which tests fill with text.
std::string firstLine(unsigned char const* code)
{
    auto const* const text = reinterpret_cast<char const*>(code);
    return std::string(text, std::strcspn(text, "\n"));
}

void printRow(Signature const& signature, Row const& row, Sizes const& sizes)
{
    std::cout << "{\"element\": " << static_cast<int>(row.element) << ", \"layout\": " << static_cast<int>(row.layout)
              << ", \"sm\": " << row.sm << ", \"isa\": " << row.ptxIsa << ", \"portable\": " << row.ptxIsPortable
              << ", \"static\": ";
    auto const number = [](auto value) { std::cout << value; };
    list(row.staticSizes, number);
    std::cout << ", \"workspace\": ";
    list(row.workspaceBytes, [&](Expression const& bytes) { std::cout << evaluate(bytes, sizes); });
    std::cout << ", \"launches\": [";
    std::vector<PlannedLaunch> const plan = planOf(signature, row, sizes);
    for (size_t index = 0; index < plan.size(); ++index)
    {
        Kernel const& kernel = row.kernels[index];
        std::cout << (index == 0 ? "" : ", ") << "{\"entry\": " << quoted(kernel.entry)
                  << ", \"threads\": " << kernel.threads << ", \"shared\": " << kernel.sharedBytes
                  << ", \"cubin\": " << quoted(firstLine(kernel.cubin))
                  << ", \"ptx\": " << quoted(firstLine(kernel.ptx)) << ", \"grid\": ";
        list(plan[index].grid, number);
        std::cout << ", \"scalars\": ";
        list(plan[index].scalars, number);
        std::cout << "}";
    }
    std::cout << "]}";
}

} // namespace

int main()
{
    std::map<std::string, int64_t> given;
    std::string symbol;
    for (int64_t size = 0; std::cin >> symbol >> size;)
    {
        given[symbol] = size;
    }
    std::cout << "{\"hash\": " << quoted(kTable.hash) << ", \"namespace\": " << quoted(kTable.pluginNamespace)
              << ", \"version\": " << quoted(kTable.pluginVersion) << ", \"signatures\": ";
    std::vector<std::pair<Operation const*, Signature const*>> signatures;
    for (Operation const& operation : kTable.operations)
    {
        for (Signature const& signature : operation.signatures)
        {
            signatures.emplace_back(&operation, &signature);
        }
    }
    list(signatures, [&](auto const& pair) {
        Signature const& signature = *pair.second;
        std::cout << "{\"op_type\": " << quoted(pair.first->opType) << ", \"name\": " << quoted(signature.name)
                  << ", \"rows\": ";
        Sizes sizes;
        for (char const* const name : signature.symbols)
        {
            sizes.push_back(given.at(name));
        }
        list(signature.rows, [&](Row const& row) { printRow(signature, row, sizes); });
        std::cout << "}";
    });
    std::cout << "}\n";
}
