// etcd from its module: `go install go.etcd.io/etcd/server/v3@...` refuses, since its go.mod has replace lines.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
