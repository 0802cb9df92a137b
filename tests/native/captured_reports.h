// Takes what is reported on stderr, for tests to look at.

#ifndef JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_
#define JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_

#include <string>
#include <utility>
#include <vector>

#include "fabric/threads/report.h"

namespace jax_ep {

// What the library reports while this lives, in place of stderr.
class CapturedReports {
 public:
  CapturedReports()
      : before_(SetReportSink([this](const auto& text) { texts_.push_back(text); })) {}
  ~CapturedReports() { SetReportSink(std::move(before_)); }
  CapturedReports(const CapturedReports&) = delete;
  CapturedReports& operator=(const CapturedReports&) = delete;

  // To be asked when nothing more can fail: a report comes before anybody's error.
  const std::vector<std::string>& texts() const { return texts_; }

 private:
  std::vector<std::string> texts_;
  ReportSink before_;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_
