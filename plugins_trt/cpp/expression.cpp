#include "expression.h"

#include <algorithm>

namespace edgeattn
{
namespace
{

int64_t apply(Step step, int64_t left, int64_t right)
{
    int64_t result = 0;
    bool failed = false;
    switch (step)
    {
    case Step::kAdd: failed = __builtin_add_overflow(left, right, &result); break;
    case Step::kSubtract: failed = __builtin_sub_overflow(left, right, &result); break;
    case Step::kMultiply: failed = __builtin_mul_overflow(left, right, &result); break;
    case Step::kMaximum: result = std::max(left, right); break;
    case Step::kMinimum: result = std::min(left, right); break;
    case Step::kFloorDivide:
    case Step::kCeilDivide: // of non-negative numbers
        failed = right <= 0 || left < 0;
        result = failed ? 0 : left / right + (step == Step::kCeilDivide && left % right != 0 ? 1 : 0);
        break;
    default: failed = true;
    }
    if (failed)
    {
        throw Error("the sizes are too large: a grid or buffer size leaves 64 bits");
    }
    return result;
}

} // namespace

int64_t evaluate(Expression const& expression, Sizes const& sizes)
{
    std::vector<int64_t> stack;
    for (Token const& token : expression)
    {
        if (token.step == Step::kNumber)
        {
            stack.push_back(token.value);
        }
        else if (token.step == Step::kSize)
        {
            stack.push_back(sizes.at(static_cast<size_t>(token.value)));
        }
        else
        {
            int64_t const right = stack.back();
            stack.pop_back();
            stack.back() = apply(token.step, stack.back(), right);
        }
    }
    return stack.back();
}

} // namespace edgeattn
