// Chooses the code for the device and loads it.
#pragma once

#include "cuda_driver.h"
#include "kernel_table.h"

#include <string>
#include <vector>

namespace edgeattn
{

//! What runs an operation: the row, and a function for each of its launches.
struct LoadedRow
{
    Row const* row;
    std::vector<CUfunction> functions;
    std::string remark; //!< empty, or why it is not machine code for this very architecture
};

//! Load the first code that the device of a context takes: machine code for its architecture, or else PTX, newest
//! architecture first. Loaded modules are kept for the life of their context. Safe to call from several threads.
//!
//! `rows` are the rows that fit; `contextId` is the id of the current context. Throws Error with every reason.
LoadedRow loadRow(std::vector<Row const*> const& rows, unsigned long long contextId);

} // namespace edgeattn
