// Prepared calls (scatterbrain/prepared.py): all arguments but the tokens are checked once and stored here, because
// passing one from the interpreter to an operator takes about as long as a hundred kernel products.
#pragma once
#include <memory>
#include <variant>

#include "arguments.h"

namespace sb {

struct PreparedCall {
  std::variant<QuadraticArguments, CentroidArguments> arguments;
  Tensors sources, copies;  // the tensors that the projections were made from, and copies of what they held then
};

// Stores a call until it is discarded. Returns its number, which no other call ever gets.
int64_t keep_prepared(PreparedCall call);
void discard_prepared(int64_t number);
std::shared_ptr<const PreparedCall> prepared_call(int64_t number);

}  // namespace sb
