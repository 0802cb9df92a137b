#ifndef JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_
#define JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fabric/report.h"

namespace jax_ep {

// What the library reports while this lives, in place of stderr.
class CapturedReports {
 public:
  CapturedReports()
      : before_(SetReportSink([this](const std::string& text) {
          const std::scoped_lock lock(mutex_);
          texts_.push_back(text);
        })) {}
  ~CapturedReports() { SetReportSink(std::move(before_)); }
  CapturedReports(const CapturedReports&) = delete;
  CapturedReports& operator=(const CapturedReports&) = delete;

  std::vector<std::string> texts() const {
    const std::scoped_lock lock(mutex_);
    return texts_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> texts_;
  ReportSink before_;
};

}  // namespace jax_ep

#endif  // JAX_EP_TESTS_NATIVE_CAPTURED_REPORTS_H_
