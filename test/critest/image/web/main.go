// SPDX-License-Identifier: Apache-2.0

// Command web is the web server of critest's images. It leaves its process id where
// nginx does, and says what critest looks for in the log.
package main

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
)

const pidFile = "/var/run/nginx.pid"

func main() {
	addr := flag.String("addr", ":80", "where to listen")
	say := flag.String("say", "", "line for standard error at the start")
	flag.Parse()
	if err := os.MkdirAll("/var/run", 0o755); err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		log.Fatal(err)
	}
	fmt.Fprintln(os.Stderr, *say)
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "It works!") })
	log.Fatal(http.ListenAndServe(*addr, nil))
}
