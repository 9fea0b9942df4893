// The Go peer: net/http, and one Redis connection that all requests share, written with net and
// bufio: what is queued while a write is under way goes out in the next one, and replies are read in
// the order of the commands. Run with GOMAXPROCS=1, as the engine's API has one core.
//
//	peer --port N --redis-socket PATH --script FILE
//
// Redis decides in the same script as the other peers (lua/buy.lua) and keeps the order, as durably
// as ours. It leaves out: the token's signature (the card is read from its claims as they stand),
// replay of a repeated key, opening times, revoked cards and unions, the hash chain, the books in
// PostgreSQL, and any check that the Redis which answers is the one that it was.
package main

import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
)

const (
	cardLimit   = 3
	priceFen    = 500
	bodyMax     = 16 * 1024
	queueMax    = 1024
	inFlightMax = 65536
	prefix      = "/api/v1/campaigns/"
	suffix      = "/orders"
)

// A reply of Redis: an integer, a text, or a list.
type reply struct {
	number int64
	text   string
	list   []reply
	err    error
}

type call struct {
	arguments []string
	done      chan reply
}

type connection struct {
	queue    chan *call
	inFlight chan *call
}

func connect(path string) (*connection, error) {
	socket, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	c := &connection{make(chan *call, queueMax), make(chan *call, inFlightMax)}
	go c.write(bufio.NewWriterSize(socket, 1<<16))
	go c.read(bufio.NewReaderSize(socket, 1<<16))
	return c, nil
}

// write sends what is queued, and flushes when nothing more is.
func (c *connection) write(out *bufio.Writer) {
	for first := range c.queue {
		c.send(out, first)
		for more := true; more; {
			select {
			case next := <-c.queue:
				c.send(out, next)
			default:
				more = false
			}
		}
		if err := out.Flush(); err != nil {
			log.Fatal(err)
		}
	}
}

func (c *connection) send(out *bufio.Writer, each *call) {
	c.inFlight <- each
	fmt.Fprintf(out, "*%d\r\n", len(each.arguments))
	for _, argument := range each.arguments {
		out.WriteByte('$')
		out.WriteString(strconv.Itoa(len(argument)))
		out.WriteString("\r\n")
		out.WriteString(argument)
		out.WriteString("\r\n")
	}
}

func (c *connection) read(in *bufio.Reader) {
	for each := range c.inFlight {
		got, err := parse(in)
		if err != nil {
			log.Fatal(err)
		}
		each.done <- got
	}
}

func parse(in *bufio.Reader) (reply, error) {
	line, err := in.ReadString('\n')
	if err != nil {
		return reply{}, err
	}
	line = strings.TrimSuffix(line, "\r\n")
	switch line[0] {
	case '+':
		return reply{text: line[1:]}, nil
	case '-':
		return reply{err: errors.New(line[1:])}, nil
	}
	number, err := strconv.ParseInt(line[1:], 10, 64)
	if err != nil {
		return reply{}, err
	}
	switch line[0] {
	case '$':
		text := make([]byte, number+2)
		_, err := io.ReadFull(in, text)
		return reply{text: string(text[:number])}, err
	case '*':
		list := make([]reply, number)
		for i := range list {
			if list[i], err = parse(in); err != nil {
				return reply{}, err
			}
		}
		return reply{list: list}, nil
	}
	return reply{number: number}, nil
}

func (c *connection) call(arguments ...string) reply {
	each := &call{arguments, make(chan reply, 1)}
	c.queue <- each
	return <-each.done
}

type wish struct {
	Quantity int     `json:"quantity"`
	Showing  *string `json:"showing"`
}

type ticket struct {
	No   int    `json:"no"`
	Code string `json:"code"`
}

type order struct {
	OrderNo       string   `json:"order_no"`
	Campaign      string   `json:"campaign"`
	Showing       string   `json:"showing"`
	Quantity      int      `json:"quantity"`
	State         string   `json:"state"`
	AmountFen     int      `json:"amount_fen"`
	PayBefore     *string  `json:"pay_before"`
	Tickets       []ticket `json:"tickets"`
	CardRemaining int64    `json:"card_remaining"`
}

type problem struct {
	Type          string `json:"type"`
	Status        int    `json:"status"`
	Code          string `json:"code"`
	Remaining     *int64 `json:"remaining,omitempty"`
	CardRemaining *int64 `json:"card_remaining,omitempty"`
}

type shop struct {
	redis *connection
	sha   string
}

// cardOf gives the card that a token names; nobody checks who signed it.
func cardOf(authorization string) string {
	parts := strings.Split(authorization, ".")
	if len(parts) != 3 {
		return ""
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var named struct {
		Sub string `json:"sub"`
	}
	if json.Unmarshal(claims, &named) != nil {
		return ""
	}
	return named.Sub
}

func answer(out http.ResponseWriter, status int, kind string, body any) {
	encoded, err := json.Marshal(body)
	if err != nil {
		log.Fatal(err)
	}
	out.Header().Set("Content-Type", kind)
	out.WriteHeader(status)
	out.Write(encoded)
}

func refuse(out http.ResponseWriter, told problem) {
	told.Type = "/problems/" + told.Code
	answer(out, told.Status, "application/problem+json", told)
}

func (s *shop) ServeHTTP(out http.ResponseWriter, request *http.Request) {
	path := request.URL.Path
	if !strings.HasPrefix(path, prefix) || !strings.HasSuffix(path, suffix) {
		refuse(out, problem{Status: 404, Code: "not-found"})
		return
	}
	campaign := path[len(prefix) : len(path)-len(suffix)]
	var asked wish
	body := json.NewDecoder(http.MaxBytesReader(out, request.Body, bodyMax))
	card := cardOf(request.Header.Get("Authorization"))
	key := request.Header.Get("Idempotency-Key")
	if request.Method != http.MethodPost || card == "" || key == "" || body.Decode(&asked) != nil ||
		asked.Quantity < 1 || asked.Quantity > cardLimit {
		refuse(out, problem{Status: 400, Code: "invalid-request"})
		return
	}
	showing := "general"
	if asked.Showing != nil {
		showing = *asked.Showing
	}
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		log.Fatal(err)
	}
	code := hex.EncodeToString(random)
	got := s.redis.call(
		"EVALSHA", s.sha, "3", "stock:"+campaign, "cards:"+campaign, "orders:"+campaign,
		card, strconv.Itoa(asked.Quantity), strconv.Itoa(cardLimit), key, showing, code,
	)
	if got.err != nil || len(got.list) == 0 {
		refuse(out, problem{Status: 503, Code: "unavailable"})
		return
	}
	switch got.list[0].number {
	case -2:
		refuse(out, problem{Status: 404, Code: "not-found"})
		return
	case -1:
		refuse(out, problem{Status: 409, Code: "limit-exceeded", CardRemaining: &got.list[1].number})
		return
	case 0:
		refuse(out, problem{Status: 409, Code: "sold-out", Remaining: &got.list[1].number})
		return
	}
	tickets := make([]ticket, asked.Quantity)
	for i := range tickets {
		tickets[i] = ticket{i + 1, code + "-" + strconv.Itoa(i+1)}
	}
	orderNo := campaign + "." + got.list[1].text
	out.Header().Set("Location", "/api/v1/orders/"+orderNo)
	answer(out, 201, "application/json", order{
		OrderNo: orderNo, Campaign: campaign, Showing: showing, Quantity: asked.Quantity,
		State: "confirmed", AmountFen: asked.Quantity * priceFen, Tickets: tickets,
		CardRemaining: got.list[2].number,
	})
}

func main() {
	port := flag.String("port", "", "of 127.0.0.1")
	path := flag.String("redis-socket", "", "where Redis listens")
	script := flag.String("script", "", "the file of the purchase script")
	flag.Parse()
	source, err := os.ReadFile(*script)
	if err != nil {
		log.Fatal(err)
	}
	redis, err := connect(*path)
	if err != nil {
		log.Fatal(err)
	}
	loaded := redis.call("SCRIPT", "LOAD", string(source))
	if loaded.err != nil {
		log.Fatal(loaded.err)
	}
	log.Fatal(http.ListenAndServe("127.0.0.1:"+*port, &shop{redis, loaded.text}))
}
