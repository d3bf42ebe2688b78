// Compiled device code on disk, in a folder that only the user can write to.
#pragma once

#include <string>

namespace tda {

// Hash of a text, 16 hexadecimal digits (FNV-1a).
std::string TextHash(const std::string& text);

// Read the code stored under a name; empty where there is none, where it is damaged, or where the folder is not private.
std::string LoadCachedCode(const std::string& name);

// Store code under a name, whole or not at all. Where the disk or the folder does not allow it, nothing is stored, and
// the next process compiles again.
void StoreCachedCode(const std::string& name, const std::string& code);

}  // namespace tda
