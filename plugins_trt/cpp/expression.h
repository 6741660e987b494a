// Evaluates the integer expressions of the kernel table.
#pragma once

#include "kernel_table.h"

#include <stdexcept>
#include <string>
#include <vector>

namespace edgeattn
{

//! Anything that keeps a plugin from doing its work. Never leaves the library: see `guarded` in logging.h.
struct Error : std::runtime_error
{
    using std::runtime_error::runtime_error;
};

//! Values of a signature's symbols, in their order.
using Sizes = std::vector<int64_t>;

//! Return the value of an expression; throw Error when it leaves 64 bits.
int64_t evaluate(Expression const& expression, Sizes const& sizes);

} // namespace edgeattn
