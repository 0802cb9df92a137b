// Implements handler_list.h, and tells Python of the list as JSON.
#include "bind/handler_list.h"

#include <string>
#include <utility>
#include <vector>

namespace jax_ep {
namespace {

std::vector<Handler>& AllHandlers() {
  static auto* all = new std::vector<Handler>();
  return *all;
}

// All of these are names: there is nothing to escape.
std::string Quoted(const std::string& name) { return "\"" + name + "\""; }

template <typename Names>
std::string ListOf(const Names& names) {
  std::string list;
  for (const std::string& name : names) {
    list += (list.empty() ? "" : ", ") + Quoted(name);
  }
  return "[" + list + "]";
}

std::string Describe(const Handler& handler) {
  std::string stages;
  for (const auto& [stage, symbol] : handler.stages) {
    stages += (stages.empty() ? "" : ", ") + Quoted(stage) + ": " + Quoted(symbol);
  }
  const Signature signature = handler.signature();
  return Quoted(handler.target) + ": {\"stages\": {" + stages +
         "}, \"operands\": " + ListOf(signature.operands) +
         ", \"results\": " + ListOf(signature.results) +
         ", \"attributes\": " + ListOf(signature.attributes) + "}";
}

std::string DescribeAll() {
  std::string text;
  for (const Handler& handler : AllHandlers()) {
    text += (text.empty() ? "" : ",\n") + Describe(handler);
  }
  return "{" + text + "}";
}

}  // namespace

bool ListHandler(Handler handler) {
  AllHandlers().push_back(std::move(handler));
  return true;
}

}  // namespace jax_ep

extern "C" const char* jax_ep_handlers() {
  static const auto* text = new std::string(jax_ep::DescribeAll());
  return text->c_str();
}
