-- Orders that live and end: held, expired, paid, cancelled as a whole or in part (INV-6, INV-11).

ALTER TABLE event DROP CONSTRAINT event_kind_known;
ALTER TABLE event ADD CONSTRAINT event_kind_known CHECK (kind IN (
    'cancelled', 'closed', 'created', 'deleted', 'expired', 'held', 'opened', 'paid', 'paused',
    'recovered', 'reopened', 'resumed', 'scheduled', 'sold', 'stock_added', 'voided'
));
ALTER TABLE event ADD COLUMN pay_before timestamptz, ADD COLUMN order_seq bigint;
COMMENT ON COLUMN event.pay_before IS 'Until when what is held is to be paid; null in every other kind.';
COMMENT ON COLUMN event.order_seq IS
    'Number of the event that made the order which this one changes; null where it changes none.';
COMMENT ON COLUMN event.showing_no IS 'Showing sold or held; null in other kinds.';
COMMENT ON COLUMN event.quantity IS 'Tickets sold or held; null in other kinds.';
COMMENT ON COLUMN event.price_fen IS 'Price of one ticket sold or held; null in other kinds.';
COMMENT ON COLUMN event.member_no IS 'The member, by number, whose order it makes or changes.';
COMMENT ON COLUMN event.actor IS 'Who did it; null in what is written by the hundred thousand.';
COMMENT ON COLUMN event.data IS 'Whole content of a kind with named fields; null in the others.';

ALTER TABLE orders DROP CONSTRAINT orders_state_check;
ALTER TABLE orders
    ADD COLUMN live integer NOT NULL,
    ADD COLUMN pay_before timestamptz,
    ADD COLUMN changed_by bigint NOT NULL DEFAULT 0,
    ADD COLUMN paid boolean NOT NULL DEFAULT false,
    ADD COLUMN returned boolean NOT NULL DEFAULT false,
    ADD CONSTRAINT orders_state_known CHECK (
        state IN ('held', 'confirmed', 'cancelled', 'expired')),
    ADD CONSTRAINT orders_live_follows_state CHECK (CASE
        WHEN state = 'held' THEN live = quantity AND NOT paid AND pay_before IS NOT NULL
        WHEN state = 'confirmed' THEN live BETWEEN 1 AND quantity
        ELSE live = 0 END),
    ADD CONSTRAINT orders_returned_was_paid CHECK (paid OR NOT returned);
CREATE INDEX orders_held ON orders (campaign_id, pay_before) WHERE state = 'held';
COMMENT ON COLUMN orders.live IS 'Tickets that count towards stock and limit.';
COMMENT ON COLUMN orders.pay_before IS 'Until when it is to be paid; null where nothing was ever held.';
COMMENT ON COLUMN orders.changed_by IS 'Number of the event that changed it last; 0: none has.';
COMMENT ON COLUMN orders.paid IS 'Money has come in for it, once (INV-11).';
COMMENT ON COLUMN orders.returned IS 'It was paid when it had ended, and the money goes back.';

CREATE TABLE ticket (
    campaign_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    no integer NOT NULL CHECK (no > 0),
    state text NOT NULL CHECK (state IN ('collected', 'cancelled')),
    changed_by bigint NOT NULL,
    PRIMARY KEY (campaign_id, seq, no)
);
COMMENT ON TABLE ticket IS 'Tickets that have changed since they were sold; every other is valid.';
COMMENT ON COLUMN ticket.campaign_id IS 'The campaign.';
COMMENT ON COLUMN ticket.seq IS 'Number of the event that made its order.';
COMMENT ON COLUMN ticket.no IS 'Number in the order, from 1.';
COMMENT ON COLUMN ticket.state IS 'collected, or cancelled: given back.';
COMMENT ON COLUMN ticket.changed_by IS 'Number of the event that changed it last.';
CREATE TRIGGER ticket_stays BEFORE DELETE ON ticket FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('a ticket is never removed');
CREATE TRIGGER ticket_given_back_stays_so BEFORE UPDATE ON ticket FOR EACH ROW
    WHEN (OLD.state = 'cancelled')
    EXECUTE FUNCTION refuse_change('a ticket that was given back is gone');

-- The legal steps of an order. `expired` comes back by a payment alone.
DROP TRIGGER orders_end_once ON orders;
DROP TRIGGER orders_keep_content ON orders;
CREATE TRIGGER orders_keep_content BEFORE UPDATE ON orders FOR EACH ROW
    WHEN ((OLD.campaign_id, OLD.seq, OLD.member_no, OLD.key_hash, OLD.showing_no, OLD.quantity,
           OLD.price_fen, OLD.created_at, OLD.pay_before)
          IS DISTINCT FROM
          (NEW.campaign_id, NEW.seq, NEW.member_no, NEW.key_hash, NEW.showing_no, NEW.quantity,
           NEW.price_fen, NEW.created_at, NEW.pay_before))
    EXECUTE FUNCTION refuse_change('only the state of an order changes');
CREATE TRIGGER orders_take_legal_steps BEFORE UPDATE ON orders FOR EACH ROW
    WHEN (NEW.changed_by <= OLD.changed_by
        OR (OLD.paid AND NOT NEW.paid) OR (OLD.returned AND NOT NEW.returned)
        OR (OLD.state, NEW.state) NOT IN (
            ('held', 'expired'), ('held', 'confirmed'), ('held', 'cancelled'),
            ('confirmed', 'confirmed'), ('confirmed', 'cancelled'),
            ('expired', 'confirmed'), ('expired', 'expired'), ('cancelled', 'cancelled'))
        OR (OLD.state IN ('held', 'expired') AND NEW.state = 'confirmed'
            AND (OLD.paid OR NOT NEW.paid OR NEW.live <> OLD.quantity))
        OR (OLD.state = 'confirmed' AND NEW.live >= OLD.live)
        OR (OLD.state = NEW.state AND OLD.state IN ('expired', 'cancelled')
            AND (OLD.paid OR NOT NEW.returned)))
    EXECUTE FUNCTION refuse_change('no order changes so (INV-6, INV-11)');

CREATE OR REPLACE FUNCTION check_orders_are_sales() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_material = off SET enable_memoize = off AS $$
DECLARE
    bad record;
BEGIN
    SELECT o.campaign_id, o.seq INTO bad
    FROM fresh o
    LEFT JOIN event e ON e.campaign_id = o.campaign_id AND e.seq = o.seq
    WHERE e.kind IS DISTINCT FROM CASE o.state WHEN 'held' THEN 'held' WHEN 'confirmed' THEN 'sold' END
        OR e.member_no IS DISTINCT FROM o.member_no
        OR e.key_hash IS DISTINCT FROM o.key_hash
        OR e.showing_no IS DISTINCT FROM o.showing_no
        OR e.quantity IS DISTINCT FROM o.quantity
        OR e.price_fen IS DISTINCT FROM o.price_fen
        OR e.at IS DISTINCT FROM o.created_at
        OR e.pay_before IS DISTINCT FROM o.pay_before
        OR o.live <> o.quantity OR o.changed_by <> 0 OR o.paid
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'orders: % % is not what the ledger says', bad.campaign_id, bad.seq
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;

-- One index probe of event a changed order, as above.
CREATE FUNCTION check_changes_are_events() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_material = off SET enable_memoize = off AS $$
DECLARE
    bad record;
BEGIN
    SELECT o.campaign_id, o.seq INTO bad
    FROM fresh o
    LEFT JOIN event e ON e.campaign_id = o.campaign_id AND e.seq = o.changed_by
    WHERE e.order_seq IS DISTINCT FROM o.seq
        OR e.member_no IS DISTINCT FROM o.member_no
        OR e.kind NOT IN ('expired', 'paid', 'cancelled')
        OR (e.kind = 'expired' AND o.state <> 'expired')
        OR (e.kind = 'paid' AND NOT o.paid)
        OR (e.kind = 'paid' AND (e.data ->> 'outcome' = 'returned') <> o.returned)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'orders: % % changed without an event that says so', bad.campaign_id, bad.seq
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION check_changes_are_events IS
    'INV-5: each change of an order is an event of the ledger about this order.';
CREATE TRIGGER orders_1_changes_are_events AFTER UPDATE ON orders
    REFERENCING NEW TABLE AS fresh EXECUTE FUNCTION check_changes_are_events();

CREATE OR REPLACE FUNCTION count_new_orders() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off AS $$
DECLARE
    wanted integer;
    found_showings integer;
BEGIN
    SELECT count(*) INTO wanted FROM (
        SELECT FROM fresh GROUP BY campaign_id, showing_no
    ) g;
    UPDATE showing s SET live = s.live + d.live
    FROM (
        SELECT campaign_id, showing_no, sum(live) AS live
        FROM fresh GROUP BY campaign_id, showing_no
    ) d
    WHERE s.campaign_id = d.campaign_id AND s.showing_no = d.showing_no;
    GET DIAGNOSTICS found_showings = ROW_COUNT;
    IF found_showings <> wanted THEN
        RAISE EXCEPTION 'orders: no such showing' USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    INSERT INTO member_use AS u (campaign_id, member_no, live, card_limit)
    SELECT d.campaign_id, d.member_no, d.live, c.card_limit
    FROM (
        SELECT campaign_id, member_no, sum(live) AS live
        FROM fresh GROUP BY campaign_id, member_no
    ) d
    LEFT JOIN campaign c USING (campaign_id)
    ON CONFLICT (campaign_id, member_no) DO UPDATE SET live = u.live + excluded.live;
    RETURN NULL;
END $$;

-- `former` gives what each order held, `fresh` what it holds: added up apart, never joined (a trigger
-- that joined its two transition tables took 16 s for 20,000 orders, this one 0.5 s).
CREATE OR REPLACE FUNCTION count_changed_orders() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE $sql$
        WITH change AS (
            SELECT campaign_id, showing_no, member_no, live FROM fresh
            UNION ALL
            SELECT campaign_id, showing_no, member_no, -live FROM former
        ), of_showing AS (
            UPDATE showing s SET live = s.live + d.live
            FROM (
                SELECT campaign_id, showing_no, sum(live) AS live FROM change
                GROUP BY campaign_id, showing_no HAVING sum(live) <> 0
            ) d
            WHERE s.campaign_id = d.campaign_id AND s.showing_no = d.showing_no
        )
        UPDATE member_use u SET live = u.live + d.live
        FROM (
            SELECT campaign_id, member_no, sum(live) AS live FROM change
            GROUP BY campaign_id, member_no HAVING sum(live) <> 0
        ) d
        WHERE u.campaign_id = d.campaign_id AND u.member_no = d.member_no
    $sql$;
    RETURN NULL;
END $$;

-- What API processes hand in is any acknowledged step, as the ledger would hold it.
CREATE FUNCTION event_row(e event) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE e.kind
        WHEN 'sold' THEN jsonb_build_array(
            e.kind, e.member_no, e.showing_no, e.quantity, e.key_hash, e.price_fen)
        WHEN 'held' THEN jsonb_build_array(
            e.kind, e.member_no, e.showing_no, e.quantity, e.key_hash, e.price_fen,
            (extract(epoch FROM e.pay_before) * 1000)::bigint)
        WHEN 'expired' THEN jsonb_build_array(e.kind, e.order_seq, e.member_no)
        ELSE jsonb_build_array(e.kind, e.data) END
$$;
COMMENT ON FUNCTION event_row IS 'An event as an entry of the ledger holds it (ledger/chain.py).';

DROP TABLE handed_in;
CREATE TABLE handed_in (
    campaign_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    epoch integer NOT NULL,
    at timestamptz NOT NULL,
    step jsonb NOT NULL,
    process text NOT NULL,
    handed_at timestamptz NOT NULL DEFAULT now(),
    settled text CHECK (settled IN ('stands', 'conflict')),
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY
);
CREATE UNIQUE INDEX handed_in_once ON handed_in (campaign_id, seq, jsonb_hash_extended(step, 0));
CREATE INDEX handed_in_unsettled ON handed_in (campaign_id, seq) WHERE settled IS NULL;
COMMENT ON TABLE handed_in IS
    'Steps that an API process had acknowledged and reported, because Redis had lost them or the '
    'process ended before the writer had seen them (INV-3).';
COMMENT ON COLUMN handed_in.campaign_id IS 'The campaign.';
COMMENT ON COLUMN handed_in.seq IS 'Event number that the member was told.';
COMMENT ON COLUMN handed_in.epoch IS 'Epoch it was told in.';
COMMENT ON COLUMN handed_in.at IS 'Campaign clock of the step.';
COMMENT ON COLUMN handed_in.step IS 'The event as an entry of the ledger holds it.';
COMMENT ON COLUMN handed_in.process IS 'API process that told it.';
COMMENT ON COLUMN handed_in.handed_at IS 'When it was reported.';
COMMENT ON COLUMN handed_in.settled IS
    'stands: the ledger says the same; conflict: it does not, see conflict; null: not applied yet.';
COMMENT ON COLUMN handed_in.id IS 'Grows with every row.';
