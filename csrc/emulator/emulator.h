// CUDA C++ for a C++ compiler, for tests: everything that device.h has from CUDA's headers elsewhere. device.h includes
// memory.h, fragments.h and launch.h itself, behind the types that they need.
//
// __shared__ is left undefined on purpose: a static array would be a plain variable, of which no access is checked for
// its bounds, for races or for bank conflicts. All shared memory is dynamic_shared()'s.
#pragma once

#include "emulator/language.h"
//
#include "emulator/machine.h"
#include "emulator/numbers.h"
#include "emulator/warp.h"
#include "emulator/wmma.h"
