// SPDX-License-Identifier: Apache-2.0

// Command nnp says who it is. Its file has the setuid bit: with no_new_privs the
// kernel ignores that, and the user stays who it was.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Printf("Effective uid: %d\n", os.Geteuid()) }
