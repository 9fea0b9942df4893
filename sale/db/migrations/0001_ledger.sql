-- The ledger, materialised: every event once and in order, the orders that follow from them, and
-- counters that refuse what the scripts in Redis should have refused already (INV-1, INV-2, INV-4,
-- INV-5, INV-10). Checks that look at many rows are statement-level triggers over transition
-- tables: a foreign key or a row-level trigger costs several times as much a row.

CREATE TABLE deployment (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    nonce uuid NOT NULL DEFAULT gen_random_uuid(),
    ticket_secret bytea NOT NULL CHECK (length(ticket_secret) = 32),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE deployment IS 'One row: which installation this is.';
COMMENT ON COLUMN deployment.only_row IS 'Always true, so that there is no second row.';
COMMENT ON COLUMN deployment.nonce IS 'Identity that every verified Redis carries too.';
COMMENT ON COLUMN deployment.ticket_secret IS '32 random bytes; ticket codes are derived from it.';
COMMENT ON COLUMN deployment.created_at IS 'When the database was made.';

INSERT INTO deployment (ticket_secret)
VALUES (sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())));

CREATE TABLE campaign (
    campaign_id text COLLATE "C" PRIMARY KEY,
    config jsonb NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'draft' CHECK (
        state IN ('draft', 'scheduled', 'open', 'paused', 'closed', 'recovering', 'deleted')
    ),
    opens_at timestamptz,
    closes_at timestamptz,
    price_fen integer NOT NULL DEFAULT 0 CHECK (price_fen >= 0),
    card_limit integer NOT NULL DEFAULT 0 CHECK (card_limit >= 0),
    epoch integer NOT NULL DEFAULT 1 CHECK (epoch >= 1),
    applied bigint NOT NULL DEFAULT 0 CHECK (applied >= 0),
    chain text NOT NULL CHECK (chain ~ '^[0-9a-f]{40}$'),
    applied_at timestamptz,
    rehearsal_of text COLLATE "C" NOT NULL
        GENERATED ALWAYS AS (coalesce(config ->> 'rehearsal_of', '')) STORED,
    purged_at timestamptz,
    CONSTRAINT campaign_purged_is_rehearsal CHECK (
        purged_at IS NULL OR (rehearsal_of <> '' AND state = 'deleted'))
);
COMMENT ON TABLE campaign IS
    'A campaign as far as its ledger has been applied. The row of a purged rehearsal stays, so that '
    'its event numbers are never used again.';
COMMENT ON COLUMN campaign.campaign_id IS 'ID of the campaign file.';
COMMENT ON COLUMN campaign.config IS 'Configuration of the last created event.';
COMMENT ON COLUMN campaign.state IS 'State after the last applied event.';
COMMENT ON COLUMN campaign.opens_at IS 'Start of the window; null: opened by hand.';
COMMENT ON COLUMN campaign.closes_at IS 'End of the window; null: closed by hand.';
COMMENT ON COLUMN campaign.price_fen IS 'Price of a ticket in fen.';
COMMENT ON COLUMN campaign.card_limit IS 'Tickets a member may hold in this campaign (INV-2).';
COMMENT ON COLUMN campaign.epoch IS 'Epoch of the last applied event; a recovery begins a new one.';
COMMENT ON COLUMN campaign.applied IS 'Number of the last applied event; moved by compare-and-set.';
COMMENT ON COLUMN campaign.chain IS 'Chain hash after that event, 40 hex digits.';
COMMENT ON COLUMN campaign.applied_at IS 'Campaign clock of that event.';
COMMENT ON COLUMN campaign.rehearsal_of IS 'The campaign that this one rehearses; empty: a real one.';
COMMENT ON COLUMN campaign.purged_at IS 'When a rehearsal was purged; then its rows may be removed.';

CREATE TABLE showing (
    campaign_id text COLLATE "C" NOT NULL REFERENCES campaign,
    showing_no integer NOT NULL CHECK (showing_no >= 0),
    showing_id text COLLATE "C" NOT NULL,
    title text NOT NULL,
    starts_at timestamptz,
    stock integer NOT NULL CHECK (stock >= 0),
    live integer NOT NULL DEFAULT 0,
    PRIMARY KEY (campaign_id, showing_no),
    UNIQUE (campaign_id, showing_id),
    CONSTRAINT showing_never_oversold CHECK (live BETWEEN 0 AND stock)
) WITH (fillfactor = 50);
COMMENT ON TABLE showing IS 'Showings of a campaign with their stock (INV-1).';
COMMENT ON COLUMN showing.campaign_id IS 'The campaign.';
COMMENT ON COLUMN showing.showing_no IS 'Position in the campaign file, from 0; what events name.';
COMMENT ON COLUMN showing.showing_id IS 'ID of the campaign file.';
COMMENT ON COLUMN showing.title IS 'Title for people.';
COMMENT ON COLUMN showing.starts_at IS 'When it begins, if it was given.';
COMMENT ON COLUMN showing.stock IS 'Tickets, with all that was added.';
COMMENT ON COLUMN showing.live IS 'Tickets in live orders; kept by the triggers of orders alone.';

CREATE TABLE event (
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    epoch integer NOT NULL,
    showing_no integer,
    quantity integer,
    price_fen integer,
    campaign_id text COLLATE "C" NOT NULL,
    -- A test compares this list with the table of kinds (sale/ledger/kinds.py).
    kind text NOT NULL CONSTRAINT event_kind_known CHECK (kind IN (
        'closed', 'created', 'deleted', 'opened', 'paused', 'recovered', 'reopened', 'resumed',
        'scheduled', 'sold', 'stock_added', 'voided'
    )),
    member_no integer,
    key_hash text COLLATE "C",
    actor text,
    reason text,
    data jsonb,
    PRIMARY KEY (campaign_id, seq)
);
COMMENT ON TABLE event IS 'The ledger: every event of every campaign, once and in order (INV-5).';
COMMENT ON COLUMN event.seq IS 'Number in the campaign: 1, 2, 3 …';
COMMENT ON COLUMN event.at IS 'Campaign clock, to the millisecond.';
COMMENT ON COLUMN event.epoch IS 'Epoch it was written in.';
COMMENT ON COLUMN event.showing_no IS 'Showing sold; null in what is not a sale.';
COMMENT ON COLUMN event.quantity IS 'Tickets sold; null in what is not a sale.';
COMMENT ON COLUMN event.price_fen IS 'Price of one ticket; null in what is not a sale.';
COMMENT ON COLUMN event.campaign_id IS 'The campaign.';
COMMENT ON COLUMN event.kind IS 'sold, created, opened …';
COMMENT ON COLUMN event.member_no IS 'Buyer, by member number; null in what is not a sale.';
COMMENT ON COLUMN event.key_hash IS 'Hash of the idempotency key, 16 hex digits.';
COMMENT ON COLUMN event.actor IS 'Who did it; null in a sale.';
COMMENT ON COLUMN event.reason IS 'Why, where a reason was given.';
COMMENT ON COLUMN event.data IS 'Whole content of what is not a sale; null in a sale.';

CREATE TABLE orders (
    seq bigint NOT NULL,
    amount_fen bigint NOT NULL
        GENERATED ALWAYS AS (price_fen::bigint * quantity::bigint) STORED,
    created_at timestamptz NOT NULL,
    showing_no integer NOT NULL,
    quantity integer NOT NULL CHECK (quantity > 0),
    price_fen integer NOT NULL CHECK (price_fen >= 0),
    campaign_id text COLLATE "C" NOT NULL,
    member_no integer NOT NULL CHECK (member_no > 0),
    key_hash text COLLATE "C" NOT NULL CHECK (length(key_hash) = 16),
    state text NOT NULL DEFAULT 'confirmed' CHECK (
        state IN ('held', 'confirmed', 'cancelled', 'expired', 'refunded', 'collected')
    ),
    PRIMARY KEY (campaign_id, seq),
    CONSTRAINT orders_one_per_key UNIQUE (member_no, campaign_id, key_hash)
) WITH (fillfactor = 90);
COMMENT ON TABLE orders IS 'Orders; each is bound to the event that made it.';
COMMENT ON COLUMN orders.seq IS 'Number of the event that made it.';
COMMENT ON COLUMN orders.amount_fen IS 'What the whole order costs.';
COMMENT ON COLUMN orders.created_at IS 'Campaign clock of the sale.';
COMMENT ON COLUMN orders.showing_no IS 'Showing it is for.';
COMMENT ON COLUMN orders.quantity IS 'Tickets.';
COMMENT ON COLUMN orders.price_fen IS 'Price of one ticket at the sale.';
COMMENT ON COLUMN orders.campaign_id IS 'The campaign.';
COMMENT ON COLUMN orders.member_no IS 'Buyer, by member number.';
COMMENT ON COLUMN orders.key_hash IS 'Hash of the idempotency key, 16 hex digits.';
COMMENT ON COLUMN orders.state IS 'held, confirmed and collected are live: they hold their tickets.';
COMMENT ON CONSTRAINT orders_one_per_key ON orders IS
    'INV-4: one key of a member in a campaign, one order. The member stands first, so that this index '
    'also finds the orders of a member; they are few, so sorting them beats a third index.';

CREATE TABLE member_use (
    campaign_id text COLLATE "C" NOT NULL,
    member_no integer NOT NULL,
    live integer NOT NULL,
    card_limit integer NOT NULL,
    PRIMARY KEY (campaign_id, member_no),
    CONSTRAINT member_use_within_limit CHECK (live BETWEEN 0 AND card_limit)
) WITH (fillfactor = 80);
COMMENT ON TABLE member_use IS 'What each member holds in each campaign (INV-2).';
COMMENT ON COLUMN member_use.campaign_id IS 'The campaign.';
COMMENT ON COLUMN member_use.member_no IS 'The member, by number.';
COMMENT ON COLUMN member_use.live IS 'Tickets in live orders; kept by the triggers of orders alone.';
COMMENT ON COLUMN member_use.card_limit IS 'Limit of the campaign when the member first bought.';

CREATE TABLE handed_in (
    campaign_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    epoch integer NOT NULL,
    at timestamptz NOT NULL,
    member_no integer NOT NULL,
    key_hash text COLLATE "C" NOT NULL,
    showing_no integer NOT NULL,
    quantity integer NOT NULL CHECK (quantity > 0),
    price_fen integer NOT NULL,
    process text NOT NULL,
    handed_at timestamptz NOT NULL DEFAULT now(),
    settled text CHECK (settled IN ('stands', 'conflict')),
    PRIMARY KEY (campaign_id, seq, member_no, key_hash)
);
CREATE INDEX handed_in_unsettled ON handed_in (campaign_id, seq) WHERE settled IS NULL;
COMMENT ON TABLE handed_in IS
    'Sales that an API process had acknowledged and reported, because Redis had lost them or the '
    'process ended before the writer had seen them (INV-3).';
COMMENT ON COLUMN handed_in.campaign_id IS 'The campaign.';
COMMENT ON COLUMN handed_in.seq IS 'Event number that the member was told.';
COMMENT ON COLUMN handed_in.epoch IS 'Epoch it was told in.';
COMMENT ON COLUMN handed_in.at IS 'Campaign clock of the sale.';
COMMENT ON COLUMN handed_in.member_no IS 'Buyer, by member number.';
COMMENT ON COLUMN handed_in.key_hash IS 'Hash of the idempotency key, 16 hex digits.';
COMMENT ON COLUMN handed_in.showing_no IS 'Showing it is for.';
COMMENT ON COLUMN handed_in.quantity IS 'Tickets.';
COMMENT ON COLUMN handed_in.price_fen IS 'Price of one ticket at the sale.';
COMMENT ON COLUMN handed_in.process IS 'API process that told it.';
COMMENT ON COLUMN handed_in.handed_at IS 'When it was reported.';
COMMENT ON COLUMN handed_in.settled IS
    'stands: the ledger says the same; conflict: it does not, see conflict; null: not applied yet.';

CREATE TABLE conflict (
    campaign_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    why text NOT NULL,
    event jsonb NOT NULL,
    found_at timestamptz NOT NULL DEFAULT now(),
    paused_at timestamptz,
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source text NOT NULL DEFAULT 'refused' CHECK (source IN ('refused', 'forked', 'handed_in'))
);
-- An index holds no more than 2,704 bytes of a row, and an event may be longer: by a hash of it.
CREATE UNIQUE INDEX conflict_once
    ON conflict (campaign_id, seq, source, jsonb_hash_extended(event, 0));
COMMENT ON TABLE conflict IS 'What was sold, or told, and does not stand as an order. None is normal.';
COMMENT ON COLUMN conflict.campaign_id IS 'The campaign.';
COMMENT ON COLUMN conflict.seq IS 'Number of the event.';
COMMENT ON COLUMN conflict.at IS 'Campaign clock of the event.';
COMMENT ON COLUMN conflict.why IS 'What PostgreSQL said, or how the event differs from the ledger.';
COMMENT ON COLUMN conflict.event IS 'The event as it stands in the ledger, or as it was told.';
COMMENT ON COLUMN conflict.found_at IS 'When it was found.';
COMMENT ON COLUMN conflict.paused_at IS 'When the campaign was paused for it; null: yet to be done.';
COMMENT ON COLUMN conflict.id IS 'Grows with every row.';
COMMENT ON COLUMN conflict.source IS
    'refused: in the ledger, but PostgreSQL refused to act on it; forked: a Redis told another '
    'story than the ledger; handed_in: an API process had acknowledged it.';

CREATE TABLE audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    actor text NOT NULL,
    action text NOT NULL,
    target text NOT NULL,
    campaign_id text COLLATE "C",
    reason text,
    data jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_log_newest ON audit_log (at DESC, id DESC);
CREATE UNIQUE INDEX audit_log_once_per_event ON audit_log (campaign_id, (data ->> 'seq'))
    WHERE campaign_id IS NOT NULL AND data ? 'seq';
-- Without these two, one page of a log of 200,000 rows took 240 ms for a campaign and minutes for a
-- union.
CREATE INDEX audit_log_by_campaign ON audit_log (campaign_id, id) WHERE campaign_id IS NOT NULL;
CREATE INDEX audit_log_created ON audit_log (campaign_id, id) WHERE action = 'campaign.created';
COMMENT ON TABLE audit_log IS 'Who did what, when and why (INV-10).';
COMMENT ON COLUMN audit_log.id IS 'Grows with every row; pages go down by it.';
COMMENT ON COLUMN audit_log.at IS 'When it was done.';
COMMENT ON COLUMN audit_log.actor IS 'Who: cli:name, operator:name, clock …';
COMMENT ON COLUMN audit_log.action IS 'What: campaign.opened, card.revoke …';
COMMENT ON COLUMN audit_log.target IS 'To what: a campaign ID, a member …';
COMMENT ON COLUMN audit_log.campaign_id IS 'The campaign, where it is about one.';
COMMENT ON COLUMN audit_log.reason IS 'Why, where a reason was given.';
COMMENT ON COLUMN audit_log.data IS 'Particulars; seq is the event it tells of, each told once.';

CREATE VIEW audit_log_owned AS
SELECT l.id, l.at, l.actor, l.action, l.target, l.campaign_id, l.reason, l.data,
    made.data -> 'config' ->> 'owner' AS owner,
    c.state NOT IN ('draft', 'deleted')
        AND coalesce(made.data -> 'config' ->> 'rehearsal_of', '') = ''
        AND NOT EXISTS (
            SELECT FROM audit_log later
            WHERE later.campaign_id = l.campaign_id AND later.action = 'campaign.created'
                AND later.id > l.id) AS published
FROM audit_log l
JOIN campaign c ON c.campaign_id = l.campaign_id
JOIN LATERAL (
    SELECT data FROM audit_log
    WHERE campaign_id = l.campaign_id AND action = 'campaign.created' AND id <= l.id
    ORDER BY id DESC LIMIT 1
) made ON true;
COMMENT ON VIEW audit_log_owned IS
    'Rows of the audit log about campaigns, with whose each is. An ID may be used again once its '
    'draft is deleted, so a row belongs to the last creation before it.';
COMMENT ON COLUMN audit_log_owned.owner IS 'Union that owned the campaign then.';
COMMENT ON COLUMN audit_log_owned.published IS
    'Whether members are told of this very campaign: no draft, no rehearsal, not of an earlier use '
    'of the ID. What is published is never deleted.';

-- For the statements that apply a run of events (sql/apply.sql) ----------------------------------

CREATE FUNCTION refuse(why text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', why USING ERRCODE = 'integrity_constraint_violation';
END $$;
COMMENT ON FUNCTION refuse IS 'Refuses the statement that calls it.';

-- The bounds are those of clock.nearest. Hours and the rest apart: the product of an interval is
-- computed as a float, which holds neither factor's milliseconds for the year 9999.
CREATE FUNCTION moment(ms jsonb) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT 'epoch'::timestamptz + n / 3600000 * interval '1 hour' + n % 3600000 * interval '1 ms'
    FROM (SELECT trunc(least(greatest((ms #>> '{}')::numeric, -62135424000000), 253402041600000))
        ::bigint AS n WHERE ms #>> '{}' IS NOT NULL) clamped
$$;
COMMENT ON FUNCTION moment IS
    'Nearest moment that a column holds of milliseconds UTC, however many; null for null.';

-- Rules ------------------------------------------------------------------------------------------

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%: %', TG_TABLE_NAME, TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END $$;
COMMENT ON FUNCTION refuse_change IS 'Refuses a statement in the words that the trigger gives.';

CREATE FUNCTION refuse_removal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM campaign
               WHERE campaign_id = OLD.campaign_id AND purged_at IS NOT NULL) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION '%: %', TG_TABLE_NAME, TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';
END $$;
COMMENT ON FUNCTION refuse_removal IS
    'Refuses to remove a row in the words of the trigger, except a row of a purged rehearsal.';

CREATE TRIGGER campaign_stays_what_it_is BEFORE UPDATE OF config ON campaign FOR EACH ROW
    WHEN (OLD.config <> '{}'
          AND (NEW.config = '{}'
               OR coalesce(OLD.config ->> 'rehearsal_of', '')
                  <> coalesce(NEW.config ->> 'rehearsal_of', '')))
    EXECUTE FUNCTION refuse_change('a rehearsal stays one, and nothing else becomes one');
CREATE TRIGGER campaign_stays_purged BEFORE UPDATE ON campaign FOR EACH ROW
    WHEN (OLD.purged_at IS NOT NULL)
    EXECUTE FUNCTION refuse_change('this rehearsal is gone');

CREATE TRIGGER event_never_changes BEFORE UPDATE OR TRUNCATE ON event
    EXECUTE FUNCTION refuse_change('the ledger is only ever added to');
CREATE TRIGGER event_stays BEFORE DELETE ON event FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('the ledger is only ever added to');
CREATE TRIGGER audit_log_never_changes BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    EXECUTE FUNCTION refuse_change('the audit log is only ever added to');
CREATE TRIGGER conflict_stays BEFORE DELETE ON conflict FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('a conflict is never removed');
CREATE TRIGGER conflict_is_never_emptied BEFORE TRUNCATE ON conflict
    EXECUTE FUNCTION refuse_change('a conflict is never removed');

CREATE TRIGGER orders_stay BEFORE DELETE ON orders FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('an order is never removed');
CREATE TRIGGER orders_are_never_emptied BEFORE TRUNCATE ON orders
    EXECUTE FUNCTION refuse_change('an order is never removed');
CREATE TRIGGER orders_keep_content BEFORE UPDATE ON orders FOR EACH ROW
    WHEN ((OLD.campaign_id, OLD.seq, OLD.member_no, OLD.key_hash, OLD.showing_no, OLD.quantity,
           OLD.price_fen, OLD.created_at)
          IS DISTINCT FROM
          (NEW.campaign_id, NEW.seq, NEW.member_no, NEW.key_hash, NEW.showing_no, NEW.quantity,
           NEW.price_fen, NEW.created_at))
    EXECUTE FUNCTION refuse_change('only the state of an order changes');
-- INV-6: what was given back once is not live again.
CREATE TRIGGER orders_end_once BEFORE UPDATE ON orders FOR EACH ROW
    WHEN (OLD.state IN ('cancelled', 'expired', 'refunded')
          AND NEW.state IN ('held', 'confirmed', 'collected'))
    EXECUTE FUNCTION refuse_change('an order that has ended stays ended');

-- Depth 0 is a statement of a client's own; the triggers of orders run deeper.
CREATE TRIGGER showing_live_is_derived BEFORE UPDATE ON showing FOR EACH ROW
    WHEN (NEW.live <> OLD.live AND pg_trigger_depth() = 0)
    EXECUTE FUNCTION refuse_change('live is kept by the orders');
CREATE TRIGGER showing_starts_unsold BEFORE INSERT ON showing FOR EACH ROW
    WHEN (NEW.live <> 0)
    EXECUTE FUNCTION refuse_change('live is kept by the orders');
CREATE TRIGGER showing_with_sales_stays BEFORE DELETE ON showing FOR EACH ROW
    WHEN (OLD.live <> 0)
    EXECUTE FUNCTION refuse_removal('tickets of it are sold');
CREATE TRIGGER member_use_is_derived BEFORE INSERT OR UPDATE ON member_use FOR EACH STATEMENT
    WHEN (pg_trigger_depth() = 0)
    EXECUTE FUNCTION refuse_change('live is kept by the orders');
CREATE TRIGGER member_use_stays BEFORE DELETE ON member_use FOR EACH ROW
    EXECUTE FUNCTION refuse_removal('live is kept by the orders');

-- INV-5. The compare-and-set has moved campaign.applied before the events come.
CREATE FUNCTION check_event_numbers() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off AS $$
DECLARE
    run record;
BEGIN
    FOR run IN
        SELECT campaign_id, min(seq) AS first, max(seq) AS last, count(*) AS n
        FROM fresh GROUP BY campaign_id
    LOOP
        IF run.first < 1
            OR run.n <> run.last - run.first + 1
            OR run.last IS DISTINCT FROM (
                SELECT applied FROM campaign WHERE campaign_id = run.campaign_id)
            OR (run.first > 1 AND NOT EXISTS (
                SELECT FROM event WHERE campaign_id = run.campaign_id AND seq = run.first - 1))
        THEN
            RAISE EXCEPTION 'event: % events of % numbered % to % do not follow',
                run.n, run.campaign_id, run.first, run.last
                USING ERRCODE = 'integrity_constraint_violation';
        END IF;
    END LOOP;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION check_event_numbers IS
    'INV-5: new events go on without a gap and end where the campaign is applied to.';
CREATE TRIGGER event_numbers_follow AFTER INSERT ON event
    REFERENCING NEW TABLE AS fresh EXECUTE FUNCTION check_event_numbers();

-- The outer join and the settings leave the planner one way: an index probe of event a new order.
-- A plan made while event was small is kept by the session, and would scan it for ever: measured,
-- 44,000 rows a second became 11,000 after 200,000 rows.
CREATE FUNCTION check_orders_are_sales() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET enable_material = off SET enable_memoize = off AS $$
DECLARE
    bad record;
BEGIN
    SELECT o.campaign_id, o.seq INTO bad
    FROM fresh o
    LEFT JOIN event e ON e.campaign_id = o.campaign_id AND e.seq = o.seq
    WHERE e.kind IS DISTINCT FROM 'sold'
        OR e.member_no IS DISTINCT FROM o.member_no
        OR e.key_hash IS DISTINCT FROM o.key_hash
        OR e.showing_no IS DISTINCT FROM o.showing_no
        OR e.quantity IS DISTINCT FROM o.quantity
        OR e.price_fen IS DISTINCT FROM o.price_fen
        OR e.at IS DISTINCT FROM o.created_at
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'orders: % % is not what the ledger says', bad.campaign_id, bad.seq
            USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION check_orders_are_sales IS
    'Each new order is a sale of the ledger, in every particular.';
CREATE TRIGGER orders_1_are_sales AFTER INSERT ON orders
    REFERENCING NEW TABLE AS fresh EXECUTE FUNCTION check_orders_are_sales();

CREATE FUNCTION count_new_orders() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off AS $$
DECLARE
    wanted integer;
    found_showings integer;
BEGIN
    SELECT count(*) INTO wanted FROM (
        SELECT FROM fresh GROUP BY campaign_id, showing_no
    ) g;
    UPDATE showing s SET live = s.live + d.quantity
    FROM (
        SELECT campaign_id, showing_no,
            coalesce(sum(quantity) FILTER (
                WHERE state IN ('held', 'confirmed', 'collected')), 0) AS quantity
        FROM fresh GROUP BY campaign_id, showing_no
    ) d
    WHERE s.campaign_id = d.campaign_id AND s.showing_no = d.showing_no;
    GET DIAGNOSTICS found_showings = ROW_COUNT;
    IF found_showings <> wanted THEN
        RAISE EXCEPTION 'orders: no such showing' USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    INSERT INTO member_use AS u (campaign_id, member_no, live, card_limit)
    SELECT d.campaign_id, d.member_no, d.quantity, c.card_limit
    FROM (
        SELECT campaign_id, member_no, sum(quantity) AS quantity
        FROM fresh WHERE state IN ('held', 'confirmed', 'collected')
        GROUP BY campaign_id, member_no
    ) d
    LEFT JOIN campaign c USING (campaign_id)
    ON CONFLICT (campaign_id, member_no) DO UPDATE SET live = u.live + excluded.live;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION count_new_orders IS 'INV-1, INV-2: adds new live orders to both counters.';
CREATE TRIGGER orders_2_count_new AFTER INSERT ON orders
    REFERENCING NEW TABLE AS fresh EXECUTE FUNCTION count_new_orders();

-- EXECUTE plans anew each time, so the plan fits the size that member_use has by now.
CREATE FUNCTION count_changed_orders() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE $sql$
        WITH change AS (
            SELECT campaign_id, showing_no, member_no, quantity FROM fresh
            WHERE state IN ('held', 'confirmed', 'collected')
            UNION ALL
            SELECT campaign_id, showing_no, member_no, -quantity FROM former
            WHERE state IN ('held', 'confirmed', 'collected')
        ), of_showing AS (
            UPDATE showing s SET live = s.live + d.quantity
            FROM (
                SELECT campaign_id, showing_no, sum(quantity) AS quantity FROM change
                GROUP BY campaign_id, showing_no HAVING sum(quantity) <> 0
            ) d
            WHERE s.campaign_id = d.campaign_id AND s.showing_no = d.showing_no
        )
        UPDATE member_use u SET live = u.live + d.quantity
        FROM (
            SELECT campaign_id, member_no, sum(quantity) AS quantity FROM change
            GROUP BY campaign_id, member_no HAVING sum(quantity) <> 0
        ) d
        WHERE u.campaign_id = d.campaign_id AND u.member_no = d.member_no
    $sql$;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION count_changed_orders IS
    'INV-6: an order that ends gives back exactly what it took.';
CREATE TRIGGER orders_count_changed AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS former NEW TABLE AS fresh
    EXECUTE FUNCTION count_changed_orders();
